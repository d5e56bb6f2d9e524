"""Whether memory still holds what was written to it: state is summed after a step and again before it next changes.

    step n updates --> sums --> forward, backward of step n + 1 --> the same sums? --> step n + 1 updates
                        |                                            no: this rank's memory has changed by itself
                        |--> what a checkpoint has staged has the same sums? no: it is not written
                        '--> holders of the same weights have the same sums? no: one of them is wrong

A sum is that of a tensor's 64-bit words, which wraps around: the flip of any single bit changes it. It runs as fast as
memory is read. It is taken of what a checkpoint is made of, and of the weights in the parameters' dtype.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from parallel.collectives import all_gather
from parallel.doing import doing
from training.checkpoint.manifest import DamagedError
from training.checkpoint.state import collect
from training.chunk import Chunk
from training.gather import is_cut
from training.setup import Setup

WORD = 8  # bytes
DRAWN = "rng/"  # what may change between steps


class CorruptionError(RuntimeError):
    """State has changed though nothing wrote to it."""


class Fingerprints:
    """Those of a rank's state. All ranks call the same methods at the same steps."""

    def __init__(self, setup: Setup, every: int) -> None:
        """Taken after every so many steps; 0: never."""
        self._setup, self._every = setup, every
        self._known: dict[str, int] = {}
        self._step = -1  # steps after which they were taken

    @doing("summing up state after step {step}")
    def take(self, step: int) -> None:
        """``step`` steps are done. Collective where it is due: holders of the same weights compare.

        Raises CorruptionError, naming ranks and the first tensor, where they differ.
        """
        if self._every and step % self._every == 0:
            self._known, self._step = self._read(), step
            compare_holders(self._setup, self._known)

    @doing("comparing state")
    def verify(self) -> None:
        """State is about to change. Raises CorruptionError, naming rank and tensor, where it already has."""
        if self._known:
            now = self._read()
            changed = [name for name, value in self._known.items() if now.get(name) != value]
            self._known = {}
            if changed:
                raise CorruptionError(
                    f"rank {self._setup.mesh.rank}: {_count(changed)} changed in memory after step {self._step}, "
                    "though nothing wrote there: do not trust this machine's memory"
                )

    def expect(self, step: int) -> Callable[[Sequence[Chunk]], None]:
        """What raises DamagedError, naming the first, for copies that are not what there was after ``step`` steps.

        It may be called in another thread, while steps go on.
        """
        known = self._known if self._step == step else {}

        def check(copies: Sequence[Chunk]) -> None:
            sums = add_up(copy.tensor for copy in copies) if known else []
            for name, value in zip(_name(copies), sums, strict=False):
                if known.get(name, value) != value:
                    raise DamagedError(f"{name} is not in memory as it was after step {step}")

        return check

    def _read(self) -> dict[str, int]:
        chunks = [chunk for chunk in collect(self._setup) if not chunk.name.startswith(DRAWN)]
        weights = find_weights(self._setup)
        names = [*_name(chunks), *weights]
        return dict(zip(names, add_up([*(chunk.tensor for chunk in chunks), *weights.values()]), strict=True))


def add_up(tensors: Iterable[Tensor]) -> list[int]:
    """The sums of ``tensors``, which are read once."""
    sums = [_add_words(tensor.detach()) for tensor in tensors]
    return torch.stack(sums).tolist() if sums else []


def find_weights(setup: Setup) -> dict[str, Tensor]:
    """This rank's parameters as it computes with them, where the engine has not cut them."""
    found: dict[str, Tensor] = {}
    for stage in setup.stages.values():
        found |= {f"weight/{name}": p for name, p in stage.named_parameters() if not is_cut(p)}
    return dict(sorted(found.items()))


def compare_holders(setup: Setup, known: Mapping[str, int]) -> None:
    """Raises CorruptionError on all holders of weights whose sums differ. Collective over them."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name in find_weights(setup):
        shard = setup.shards[name.partition("/")[2]]
        groups.setdefault((str(shard.placement.holders), shard.across), []).append(name)
    for _, names in sorted(groups.items()):  # ranks that share several groups meet in the same order
        group = setup.mesh.holders(setup.shards[names[0].partition("/")[2]])
        mine = torch.tensor([known[name] for name in names], device=setup.mesh.device)
        rows = all_gather(mine, group).wait().tolist()
        for name, *values in zip(names, *rows, strict=True):
            if len(set(values)) > 1:
                raise CorruptionError(_tell_apart(name, values, torch.distributed.get_process_group_ranks(group)))


def _tell_apart(name: str, values: Sequence[int], ranks: Sequence[int]) -> str:
    """Who is wrong, if most agree."""
    (most, count), *_ = Counter(values).most_common()
    odd = [rank for rank, value in zip(ranks, values, strict=True) if value != most]
    if 2 * count > len(values):
        return f"rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))}: {name} is not what its other holders have"
    return f"ranks {', '.join(map(str, ranks))}: {name} is not the same on all, and should be: one of them is wrong"


def _name(chunks: Sequence[Chunk]) -> list[str]:
    return [f"{chunk.name} at {list(chunk.offset)}" for chunk in chunks]


def _count(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _add_words(tensor: Tensor) -> Tensor:
    """The sum of the 64-bit words of a tensor's bytes; of what is left before and behind them, of bytes."""
    content = tensor.contiguous().view(-1).view(torch.uint8)
    before = -content.data_ptr() % WORD
    body = content[before : before + (len(content) - before) // WORD * WORD] if len(content) > before else content[:0]
    rest = torch.cat([content[:before], content[before + len(body) :]])
    return body.view(torch.int64).sum() + rest.sum(dtype=torch.int64)
