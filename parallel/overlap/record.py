"""Streams that compute as ever and write down who waits for whom: a proof that no lane reads what is not there yet.

    compute    w(x) ------------------------------------ r(y)         r(y) is right, because compute has waited for
    comm             r(x) w(y') -- wire -- r(y') w(y)                 comm, which has waited for the wire

Every lane has a clock that counts what it has done, and knows of the other lanes how far it has waited for them (vector
clocks: Mattern, 1988). Whatever reads a tensor must have waited for who wrote it, and whatever writes one for all who
have read or written it before. On one processor a missing wait changes no result; here it is a hazard. What travels is
a lane of its own, one for each collective: it ends when somebody waits for its work.

What is proved is what runs on a GPU, ``Streams`` of parallel/overlap/lanes.py: the recorder stands for torch.cuda.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.overlap.lanes import Idle, Start, Streams, T, rest
from parallel.pending import Pending

COMPUTE, COMM = "compute", "comm"
Clock = dict[str, int]  # lane -> how much of it has been waited for
# Which of its arguments a collective writes: its schema does not say.
WRITTEN = {"alltoall_base_": (0,), "recv_": (0,), "send": ()}


class Mark(NamedTuple):
    """Bytes of a storage that a lane has read or written, and when."""

    start: int
    stop: int
    lane: str
    time: int

    def meets(self, other: "Mark") -> bool:
        """Whether both have a byte."""
        return self.start < other.stop and other.start < self.stop


class Lane(NamedTuple):
    """Stands for a stream."""

    recorder: "Recorder"
    name: str

    def wait_stream(self, other: "Lane") -> None:
        """What this one is given from now on comes behind what the other has been given."""
        self.recorder._wait(self.name, other.name)


class Wired(NamedTuple):
    """A work, and the wires that whoever waits for it has waited for."""

    recorder: "Recorder"
    work: Any
    wires: list[str]

    def wait(self) -> None:
        """See ``torch.distributed.Work``."""
        self.work.wait()
        for wire in self.wires:
            self.recorder._wait(self.recorder._lane, wire)


class Recorder(TorchDispatchMode):
    """Sees every operation while it is entered, and is the lanes that run them: a ``parallel.overlap.lanes.Lanes``."""

    def __init__(self) -> None:
        super().__init__()
        self._streams = Streams(self)
        self.idle: Idle = rest
        self.hazards: list[str] = []
        self.crossings = 0  # reads of what another lane has written
        self._lane = COMPUTE
        self._clocks: dict[str, Clock] = {COMPUTE: {COMPUTE: 0}, COMM: {COMM: 0}}
        self._written: dict[int, list[Mark]] = {}  # of each storage: who wrote what last
        self._read: dict[int, list[Mark]] = {}  # and who has read it since
        self._kept: list[torch.UntypedStorage] = []  # lest one be taken for another
        self._wires: list[str] = []

    def start(self, start: Start[T], *tensors: Tensor) -> Pending[T]:
        """See ``Lanes``."""

        def watched(*given: Tensor) -> Pending[T]:
            first = len(self._wires)
            pending = start(*given)
            wires = self._wires[first:]
            return Pending(tuple(Wired(self, work, wires) for work in pending.works), pending.finish)  # type: ignore[misc]

        return self._streams.start(watched, *tensors)

    def Stream(self, priority: int) -> Lane:  # noqa: N802 (torch.cuda's name)
        """The lane for communication."""
        return Lane(self, COMM)

    def current_stream(self) -> Lane:
        """The lane that is given work now."""
        return Lane(self, self._lane)

    @contextmanager
    def stream(self, lane: Lane) -> Iterator[None]:
        """Gives work to ``lane``."""
        before, self._lane = self._lane, lane.name
        yield
        self._lane = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, travels = str(func), func.namespace == "c10d"
        lane = self._begin_wire(name) if travels else self._lane
        self._clocks[lane][lane] += 1
        written = _find_written(func, args, kwargs, travels)
        for tensor in _tensors((args, kwargs)):
            if not any(tensor is other for other in written):
                self._note_read(lane, tensor, name)
        out = func(*args, **kwargs)
        known = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        made = [] if travels else [tensor for tensor in _tensors(out) if _storage(tensor) not in known]
        for tensor in (*written, *made):
            self._note_write(lane, tensor, name)
        return out

    def _begin_wire(self, name: str) -> str:
        wire = f"wire {len(self._wires)} of {name}"
        self._wires.append(wire)
        self._clocks[wire] = {**self._clocks[self._lane], wire: 0}
        return wire

    def _wait(self, lane: str, other: str) -> None:
        mine = self._clocks[lane]
        for each, time in self._clocks[other].items():
            mine[each] = max(mine.get(each, 0), time)

    def _note_read(self, lane: str, tensor: Tensor, name: str) -> None:
        mark, storage = self._mark(lane, tensor), _storage(tensor)
        for writer in filter(mark.meets, self._written.get(storage, ())):
            self.crossings += writer.lane != lane
            self._check(mark, writer, f"{name} on {lane} reads what {writer.lane} wrote")
        _put(self._read.setdefault(storage, []), mark)

    def _note_write(self, lane: str, tensor: Tensor, name: str) -> None:
        mark, storage = self._mark(lane, tensor), _storage(tensor)
        if storage not in self._written:
            self._kept.append(tensor.untyped_storage())
        for writer in filter(mark.meets, self._written.get(storage, ())):
            self._check(mark, writer, f"{name} on {lane} overwrites what {writer.lane} wrote")
        for reader in filter(mark.meets, self._read.get(storage, ())):
            self._check(mark, reader, f"{name} on {lane} overwrites what {reader.lane} reads")
        _put(self._written.setdefault(storage, []), mark)

    def _mark(self, lane: str, tensor: Tensor) -> "Mark":
        size = tensor.element_size()
        reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start = int(tensor.storage_offset()) * size
        return Mark(start, start + int(reach) * size * (tensor.numel() > 0), lane, self._clocks[lane][lane])

    def _check(self, mark: "Mark", other: "Mark", what: str) -> None:
        if mark.lane != other.lane and self._clocks[mark.lane].get(other.lane, 0) < other.time:
            self.hazards.append(f"{what}, without having waited for it")


def _put(marks: list[Mark], mark: Mark) -> None:
    """Adds a mark; those of the same lane that lie within it are behind it."""
    marks[:] = [
        old for old in marks if not (old.lane == mark.lane and mark.start <= old.start and old.stop <= mark.stop)
    ]
    marks.append(mark)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _find_written(func: Any, args: Sequence[Any], kwargs: dict[str, Any], travels: bool) -> list[Tensor]:
    """The arguments that an operation writes to."""
    if travels:
        return _tensors([args[place] for place in WRITTEN[func._opname]])
    found = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
    return found
