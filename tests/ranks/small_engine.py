"""Toy parameters with gradients by decree, on any layout: what the native engine makes of them, and of faults in it.

The gradient of a parameter is a sum of as many shares as it has holders; holder k contributes share k of its part. One
process that adds up all shares in the same order must come to the same weights, norms and state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parallel.mesh import Mesh, Traffic
from parallel.placement import REPLICATED, Placement, Shard, cut
from parallel.topology import Axis, Topology
from training import native, slab
from training.chunk import Chunk
from training.config import OptimizerConfig
from training.engine import Update
from training.native import Native

SHAPES = {
    "embedding": (37, 13),
    "up": (2, 9, 13),  # split over tp on its second dim: 4 and 5 rows
    "experts": (4, 3, 5),
    "norm": (29,),
    "tiny": (1, 3),  # fewer rows than holders
    "idle": (5, 3),  # never gets a gradient
    "router": (3, 8),
}
PLACEMENTS = {"up": Placement(Axis.tp, 1), "experts": Placement(Axis.ep, 0)}


@dataclass(frozen=True)
class Toy:
    """What is trained, and how."""

    topology: Topology
    holders: Topology  # whose holders contribute shares: the topology, or the one that a single process stands for
    steps: int = 3
    dtype: torch.dtype = torch.float64
    config: dict[str, Any] = field(default_factory=dict)
    bad: tuple[int, int] | None = None  # a rank, and the step in which its gradient is not finite
    fault: str | None = None  # a key of FAULTS


class Taken(NamedTuple):
    """What a rank ends with."""

    updates: list[Update]
    parts: dict[str, tuple[Shard, Tensor]]
    chunks: list[Chunk]
    count: int  # updates applied


class Parameters(nn.Module):
    """This rank's parts."""

    def __init__(self, shards: dict[str, Shard], dtype: torch.dtype) -> None:
        super().__init__()
        for name, shard in shards.items():
            # A router keeps float32: parameters of two dtypes have two slabs.
            wide = torch.promote_types(dtype, torch.float32) if name == "router" else dtype
            self.register_parameter(name, nn.Parameter(draw(name, "initial")[shard.slices].to(wide)))


def draw(name: str, *what: object) -> Tensor:
    """Numbers for a parameter, the same in every process."""
    key = sum(ord(letter) * 31**place for place, letter in enumerate(f"{name}/{what}")) % 2**31
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(key), dtype=torch.float64)


def make(toy: Toy, mesh: Mesh) -> tuple[Parameters, dict[str, Shard], Native]:
    """Parameters and their engine."""
    shards = {
        name: cut(shape, PLACEMENTS.get(name, REPLICATED), toy.topology, mesh.rank) for name, shape in SHAPES.items()
    }
    module = Parameters(shards, toy.dtype)
    settings = {"lr": 1e-2, "no_decay": ("norm",), "clip": 0.5, "weight_decay": 0.3, **toy.config}
    return module, shards, Native({0: module}, shards, mesh, OptimizerConfig(**settings))


def contribute(toy: Toy, mesh: Mesh, module: Parameters, shards: dict[str, Shard], step: int) -> None:
    """A backward that gives every parameter the shares that this rank stands for."""
    for name, parameter in module.named_parameters():
        if name == "idle":
            continue
        axis = shards[name].placement.holders
        alone = toy.topology.degree(axis) == 1
        held = range(toy.holders.degree(axis)) if alone else [mesh.coordinate(axis)]
        for share in held:
            gradient = draw(name, step, share)[shards[name].slices]
            if toy.bad == (mesh.rank, step) and name == "up":
                gradient = gradient * float("nan")
            (parameter.to(torch.float64) * gradient).sum().backward()


def take_steps(rank: int, world: int, toy: Toy) -> Taken:
    """``toy.steps`` steps on this rank."""
    mesh = Mesh(toy.topology, torch.device("cpu"))
    module, shards, engine = make(toy, mesh)
    if toy.fault is not None:
        FAULTS[toy.fault](mesh)
    updates = []
    for step in range(toy.steps):
        engine.begin()
        contribute(toy, mesh, module, shards, step)
        engine.finished(0)
        updates.append(engine.step(1e-2 * (1 + step)))
    return take(module, shards, engine, updates)


def take(module: Parameters, shards: dict[str, Shard], engine: Native, updates: list[Update]) -> Taken:
    """A copy of what there is now."""
    engine.settle()
    parts = {name: (shards[name], p.detach().clone()) for name, p in module.named_parameters()}
    state = engine.state()
    chunks = [chunk._replace(tensor=chunk.tensor.clone()) for chunk in state.chunks]
    return Taken(updates, parts, chunks, state.steps)


def join(ranks: Sequence[Taken]) -> dict[str, Tensor]:
    """The whole parameters. Ranks that hold the same part must have the same bits."""
    whole: dict[str, Tensor] = {}
    for taken in ranks:
        for name, (shard, part) in taken.parts.items():
            into = whole.setdefault(name, torch.full(shard.global_shape, float("nan"), dtype=part.dtype))
            known = into[shard.slices]
            assert known.isnan().all() or torch.equal(known, part), f"holders of {name} disagree"
            into[shard.slices] = part
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def join_state(ranks: Sequence[Taken]) -> dict[str, Tensor]:
    """The whole state. Every element must be on one rank."""
    whole: dict[str, Tensor] = {}
    for chunk in (chunk for taken in ranks for chunk in taken.chunks):
        into = whole.setdefault(chunk.name, torch.full(chunk.global_shape, float("nan"), dtype=chunk.tensor.dtype))
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.tensor.shape, strict=True))
        assert into[place].isnan().all(), f"{chunk.name} has two owners"
        into[place] = chunk.tensor
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _wrap(change: Callable[[Tensor, Sequence[range], int], None], mesh: Mesh) -> None:
    """Lets ``change`` at a bucket, its pieces and this rank's place, after every reduction."""
    reduce = slab.reduce_pieces

    def changed(buffer: Tensor, pieces: Sequence[range], group: Any) -> Callable[[], None]:
        finish = reduce(buffer, pieces, group)

        def finish_and_change() -> None:
            finish()
            change(buffer, pieces, torch.distributed.get_rank(group))

        return finish_and_change

    slab.reduce_pieces = changed


def _skip_reduction(mesh: Mesh) -> None:
    slab.reduce_pieces = lambda *_: lambda: None


def _double(mesh: Mesh) -> None:
    _wrap(lambda buffer, pieces, place: buffer[pieces[place].start : pieces[place].stop].mul_(2), mesh)


def _average(mesh: Mesh) -> None:
    _wrap(lambda buffer, pieces, place: buffer[pieces[place].start : pieces[place].stop].div_(len(pieces)), mesh)


def _swap_groups(mesh: Mesh) -> None:
    """Sums experts over ep instead of edp, as many ranks."""
    reduce, wrong = slab.reduce_pieces, mesh.group(Axis.ep, Traffic.tokens)

    def swapped(buffer: Tensor, pieces: Sequence[range], group: Any) -> Callable[[], None]:
        experts = len(buffer) == 64  # the only slab of this size
        return reduce(buffer, pieces, wrong if experts and len(pieces) == 2 else group)

    slab.reduce_pieces = swapped


def _skip_gather(mesh: Mesh) -> None:
    slab.gather_pieces = lambda *_: lambda: None


def _skip_norm(mesh: Mesh) -> None:
    native.sum_over = lambda tensor, *_: tensor


def _double_norm(mesh: Mesh) -> None:
    total = native.sum_over
    native.sum_over = lambda tensor, *rest: total(tensor, *rest) * 2


def _stage_norm(mesh: Mesh) -> None:
    """As if every rank's pieces were all there is along dp."""
    total = native.sum_over
    native.sum_over = lambda tensor, mesh: total(tensor, mesh, Axis.dp)


FAULTS: dict[str, Callable[[Mesh], None]] = {
    "reduction skipped": _skip_reduction,
    "reduction doubled": _double,
    "averaged instead of summed": _average,
    "wrong group": _swap_groups,
    "weights not gathered": _skip_gather,
    "norm of a rank": _skip_norm,
    "norm counted twice": _double_norm,
    "norm over the wrong group": _stage_norm,
}
