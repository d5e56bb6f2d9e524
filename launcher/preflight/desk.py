"""Where ranks tell rank 0 what they have measured, and hear what came of it: JSON in the store where they meet.

    gather    every rank: a value --> rank 0: the values of all, by rank
    tell      rank 0: a value --> every rank
    meet      nobody goes on before all have come
    leave     rank 0 is the last to go: the store may live in it

It needs no process group, so that it works where those cannot be made.
"""

import json
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import Store


class Desk(NamedTuple):
    """A rank's way to the others. All call the same methods in the same order, each time with a name of its own."""

    store: "Store"
    rank: int
    world: int
    local: int  # its place among the ranks of its machine
    here: int  # ranks of its machine
    node: str  # the name of that

    @property
    def leads(self) -> bool:
        """Whether it speaks for its machine."""
        return self.local == 0

    def gather(self, name: str, value: Any) -> list[Any]:
        """On rank 0, what every rank gives; nothing on others."""
        self.store.set(f"{name} of {self.rank}", json.dumps(value))
        if self.rank:
            return []
        return [json.loads(self.store.get(f"{name} of {rank}")) for rank in range(self.world)]

    def tell(self, name: str, value: Any = None) -> Any:
        """What rank 0 gives."""
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
        return json.loads(self.store.get(name))

    def meet(self, name: str) -> None:
        """Returns once all are here."""
        if self.store.add(f"{name} come", 1) == self.world:
            self.store.set(f"{name} go", "yes")
        self.store.wait([f"{name} go"])

    def leave(self, name: str) -> None:
        """Returns on rank 0 once all others have called it."""
        self.store.set(f"{name} left {self.rank}", "yes")
        if self.rank == 0:
            self.store.wait([f"{name} left {rank}" for rank in range(self.world)])


def name_node(environment: Mapping[str, str]) -> str:
    """This machine, as its scheduler calls it, or as it calls itself."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def find_leaders(locals_: list[int]) -> list[int]:
    """The first rank of each machine, from every rank's place on its own."""
    return [rank for rank, local in enumerate(locals_) if local == 0]
