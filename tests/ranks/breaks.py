"""Faults planted into collectives, as data: which call, and what goes wrong with it.

A call is named by file, function, what is called, and which of such calls in that function it is. While planted, that
call and no other goes wrong, in the same way on every rank, so that nothing hangs and only numbers can tell.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from sites import Site, find_calls
from torch import Tensor

from parallel.collectives import Pending
from parallel.mesh import Mesh
from parallel.pipeline.lower import Exchange, Kind
from parallel.pipeline.run import UnderWay
from parallel.topology import Axis
from parallel.traffic import Traffic
from training.chunk import Chunk


class Break(NamedTuple):
    """What goes wrong where."""

    site: Site
    kind: str  # a key of KINDS
    ranks: int = 2  # 2: tp and ep over the same two; 4: dp as well
    how: str = "native"  # what notices: a key of test_breaks.CASES, or of promises.PROMISES


class Overridden:
    """``torch.distributed`` with one name replaced."""

    def __init__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


@contextmanager
def planted(broken: Break, mesh: Mesh) -> Iterator[list[int]]:
    """Plants the break in this process. Yields a list that grows with every call that went wrong."""
    site, hits = broken.site, list[int]()
    lines = find_calls(site.file)[site]
    module = importlib.import_module(site.file.removesuffix(".py").replace("/", "."))
    owner, _, name = site.callee.rpartition(".")
    where = getattr(module, site.function.partition(".")[0]) if owner == "self" else module
    original = getattr(dist if owner == "dist" else where, name)

    def call(*args: Any, **options: Any) -> Any:
        if sys._getframe(1).f_code.co_filename.endswith(site.file) and sys._getframe(1).f_lineno in lines:
            hits.append(1)
            return KINDS[broken.kind](mesh, original, *args, **options)
        return original(*args, **options)

    replaced = owner if owner == "dist" else name
    kept = getattr(where, replaced)
    setattr(where, replaced, Overridden(name, call) if owner == "dist" else call)
    yield hits
    setattr(where, replaced, kept)


def find_group(args: tuple[Any, ...], options: dict[str, Any]) -> dist.ProcessGroup:
    """The group a collective is called with."""
    return next(value for value in (*args, *options.values()) if isinstance(value, dist.ProcessGroup))


Call = Callable[..., Any]


def skip(mesh: Mesh, call: Call, x: Tensor, *args: Any, **options: Any) -> Pending[Any]:
    """Every rank goes on with what it has itself."""
    group = find_group(args, options)
    own = {
        "all_gather": lambda: x.expand(group.size(), *x.shape).contiguous(),
        "sum_scatter": lambda: x[group.rank()].clone(),
        "all_to_all": lambda: x.new_zeros(sum(args[1]), *x.shape[1:]),
        "all_reduce": lambda: x.clone(),
    }
    return Pending((), own[call.__name__])


def change(alter: Callable[[Tensor, dist.ProcessGroup], Tensor], numbers: bool = True) -> Call:
    """The result is altered after the fact; of several tensors those of ``numbers``, or else those of indices."""

    def broken(mesh: Mesh, call: Call, *args: Any, **options: Any) -> Pending[Any]:
        pending, group = call(*args, **options), find_group(args, options)

        def finish() -> Any:
            result = pending.finish()
            if isinstance(result, Tensor):
                return alter(result, group)
            return tuple(alter(part, group) if part.is_floating_point() == numbers else part for part in result)

        return Pending(pending.works, finish)

    return broken


def swap_splits(mesh: Mesh, call: Call, rows: Any, *args: Any) -> Pending[Any]:
    """What came from the first rank is taken for what came from the last."""
    pending, received = call(rows, *args), list(args[-2])

    def finish() -> Any:
        result = pending.finish()
        parts = [torch.cat(part.split(received)[::-1]) for part in ([result] if isinstance(result, Tensor) else result)]
        return parts[0] if isinstance(result, Tensor) else tuple(parts)

    return Pending(pending.works, finish)


def take_wrong_group(mesh: Mesh, call: Call, *args: Any, **options: Any) -> Any:
    """The neighbours along dp instead of those along tp and ep, or the other way round, where they are as many."""
    across, along = mesh.group(Axis.replicas, Traffic.data), mesh.group(Axis.tp, Traffic.tensor)
    right = find_group(args, options)
    ranks = dist.get_process_group_ranks(right)
    other = along if ranks == dist.get_process_group_ranks(across) else across
    other = other if len(ranks) == other.size() else right
    wrong = [other if isinstance(value, dist.ProcessGroup) else value for value in args]
    return call(*wrong, **{n: other if isinstance(v, dist.ProcessGroup) else v for n, v in options.items()})


class Done:
    """Work that needs no waiting."""

    def wait(self) -> None:
        """Returns at once."""


def leave(mesh: Mesh, call: Call, *args: Any, **options: Any) -> Done:
    """Nothing is sent, and buffers stay as they are."""
    return Done()


def erase(mesh: Mesh, call: Call, out: Tensor, *args: Any, **options: Any) -> Done:
    """Nothing is sent, and zeros arrive."""
    out.zero_()
    return Done()


def finish_at_once(mesh: Mesh, call: Call, *args: Any, **options: Any) -> Callable[[], None]:
    """Nothing is sent, and there is nothing to complete."""
    return lambda: None


def lose(mesh: Mesh, call: Call, operations: list[dist.P2POp]) -> list[dist.Work]:
    """Nothing is sent, and zeros arrive."""
    for operation in operations:
        if operation.op is dist.irecv:
            operation.tensor.zero_()
    return [Done()] * len(operations)  # type: ignore[list-item]


def double_batch(mesh: Mesh, call: Call, operations: list[dist.P2POp]) -> list[dist.Work]:
    """All that is sent is doubled on its way."""
    for operation in operations:
        if operation.op is dist.isend:
            operation.tensor = operation.tensor * 2
    return call(operations)  # type: ignore[no-any-return]


def leave_unsent(mesh: Mesh, call: Call, runner: Any, exchange: Exchange, tensors: list[Tensor]) -> list[UnderWay]:
    """Nothing is sent, and zeros arrive."""
    for transfer, tensor in zip(exchange.transfers, tensors, strict=True):
        if transfer.kind is Kind.receive:
            tensor.zero_()
    return [UnderWay(tensor, Done()) for tensor in tensors]  # type: ignore[arg-type]


def send_doubled(mesh: Mesh, call: Call, runner: Any, exchange: Exchange, tensors: list[Tensor]) -> Any:
    """All that is sent counts twice."""
    ends = zip(exchange.transfers, tensors, strict=True)
    return call(runner, exchange, [tensor * 2 if end.kind is Kind.send else tensor for end, tensor in ends])


def scale_received(factor: float) -> Call:
    """What others sent counts ``factor`` times."""

    def broken(mesh: Mesh, call: Call, sent: list[Tensor], received: list[Tensor], group: Any) -> list[dist.Work]:
        for work in call(sent, received, group):
            work.wait()
        for rank, tensor in enumerate(received):
            if rank != dist.get_rank(group) and tensor.is_floating_point():  # others are counts, or rows with indices
                tensor *= factor
        return []

    return broken


def alter_block(alter: Callable[[Tensor, Tensor], object]) -> Call:
    """What arrives is altered, given what was sent."""

    def broken(mesh: Mesh, call: Call, sent: Tensor, target: int, room: Tensor, *args: Any) -> list[Done]:
        for work in call(sent, target, room, *args):
            work.wait()
        alter(room, sent)
        return [Done()]

    return broken


def swap_elsewhere(mesh: Mesh, call: Call, sent: Tensor, target: int, room: Tensor, *args: Any) -> list[dist.Work]:
    """The neighbour along dp instead of that along tp, where there are two of each."""
    across = mesh.group(Axis.replicas, Traffic.data)
    other = 1 - across.rank()
    return call(sent, other, room, other, across)  # type: ignore[no-any-return]


def double_in_place(mesh: Mesh, call: Call, tensor: Tensor, *args: Any, **options: Any) -> None:
    """The sum is taken twice."""
    call(tensor, *args, **options)
    tensor.mul_(2)


def keep_own(mesh: Mesh, call: Call, tensor: Tensor, *args: Any) -> Tensor:
    """Every rank takes its share for the sum."""
    return tensor


def count_twice(mesh: Mesh, call: Call, tensor: Tensor, *args: Any) -> Tensor:
    """The sum is taken twice."""
    total: Tensor = call(tensor, *args)
    return total.mul_(2)


def take_wrong_axis(mesh: Mesh, call: Call, tensor: Tensor, _: Mesh, axis: Axis = Axis.world) -> Any:
    """Over dp instead of all, or the other way round."""
    return call(tensor, mesh, Axis.stage if axis is Axis.dp else Axis.dp)


def hear_nothing(mesh: Mesh, call: Call, *args: Any) -> Any:
    """No rank has said anything."""
    if isinstance(args[0], Tensor):
        return torch.zeros_like(args[0])
    said = args[-1]
    return [] if isinstance(said, str) else type(said)(*(False for _ in said)) if isinstance(said, tuple) else False


def send_wrong(mesh: Mesh, call: Call, tensor: Tensor, *args: Any, **options: Any) -> None:
    """Something else is sent."""
    call(tensor + 1, *args, **options)


def receive_nothing(mesh: Mesh, call: Call, tensor: Tensor, *args: Any, **options: Any) -> None:
    """Zeros arrive."""
    call(tensor, *args, **options)
    tensor.zero_()


def receive_wrong(mesh: Mesh, call: Call, tensor: Tensor, *args: Any, **options: Any) -> None:
    """Something else arrives."""
    call(tensor, *args, **options)
    tensor.add_(1)


def leave_first_moments(mesh: Mesh, call: Call, own: list[Chunk], *args: Any) -> None:
    """Experts move without their first moments."""
    kept = [chunk.tensor.clone() for chunk in own]
    call(own, *args)
    for chunk, tensor in zip(own, kept, strict=True):
        if chunk.name.startswith("m/"):
            chunk.tensor.copy_(tensor)


def travel_the_other_way(mesh: Mesh, call: Call, rows: Tensor, came_from: Tensor, _: Mesh) -> Any:
    """The permutation is taken for its inverse."""
    return call(rows, came_from.argsort(), mesh)


def work(mesh: Mesh, call: Call, *args: Any, **options: Any) -> Any:
    """As it should."""
    return call(*args, **options)


KINDS: dict[str, Call] = {
    "nothing": work,
    "skipped": skip,
    "doubled": change(lambda result, group: result * 2),
    "averaged": change(lambda result, group: result / group.size()),
    "zeroed": change(lambda result, group: result * 0),
    "shuffled": change(lambda result, group: result.flip(-1)),
    "indices shuffled": change(lambda result, group: result.flip(-1), numbers=False),
    "swapped splits": swap_splits,
    "wrong group": take_wrong_group,
    "left alone": leave,
    "erased": erase,
    "never started": finish_at_once,
    "lost": lose,
    "batch doubled": double_batch,
    "unsent": leave_unsent,
    "sent doubled": send_doubled,
    "received doubled": scale_received(2),
    "received averaged": scale_received(0.5),
    "block lost": alter_block(lambda room, sent: room.zero_()),
    "block doubled": alter_block(lambda room, sent: room.mul_(2)),
    "block over the wrong group": swap_elsewhere,
    "block of the wrong owner": alter_block(lambda room, sent: room.copy_(sent)),
    "doubled in place": double_in_place,
    "own alone": keep_own,
    "counted twice": count_twice,
    "wrong axis": take_wrong_axis,
    "unheard": hear_nothing,
    "sent wrong": send_wrong,
    "received nothing": receive_nothing,
    "received wrong": receive_wrong,
    "first moments stay": leave_first_moments,
    "the other way": travel_the_other_way,
}
