"""Which part of each parameter a rank holds, as a table: the one source for sharding, sums, norms and files.

    Row("*.mla.o.weight", Placement(Axis.tp, 1))      the second dim is split over tp
    Row("*.routed.*.weight", Placement(Axis.ep, 0))   each rank of an ep group holds its own experts
    Row("*norm.weight", REPLICATED)                   every rank of the stage holds the whole

From a placement follows who holds the same part. Gradients are summed over those ranks and over no others (each sees
its own tokens only, also where a parameter is replicated over tp: summed, never averaged), each of them owns a piece of
the optimizer's state, and the gradient's norm counts every owned piece once.
"""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from parallel.topology import Axis, Topology


class Placement(NamedTuple):
    """Split along ``dim`` over ``axis``, or whole on every rank of the stage."""

    axis: Axis | None = None
    dim: int = 0

    @property
    def holders(self) -> Axis:
        """The axis whose groups hold the same part of the parameter."""
        return HOLDERS[self.axis]


class Row(NamedTuple):
    """A line of a plan: a pattern of global names, and where such parameters lie."""

    pattern: str
    placement: Placement


REPLICATED = Placement()
HOLDERS = {None: Axis.stage, Axis.tp: Axis.replicas, Axis.ep: Axis.edp}
Plan = Sequence[Row]


def place(plan: Plan, names: Iterable[str]) -> dict[str, Placement]:
    """The placement of every name, by the first row that matches it.

    Raises ValueError for a name without a row and for a row that is the first for no name.
    """
    placements: dict[str, Placement] = {}
    unused = {row.pattern for row in plan}
    for name in names:
        row = next((row for row in plan if fnmatchcase(name, row.pattern)), None)
        if row is None:
            raise ValueError(f"no row of the plan matches the parameter {name}")
        unused.discard(row.pattern)
        placements[name] = row.placement
    if unused:
        raise ValueError(f"rows of the plan match no parameter: {', '.join(sorted(unused))}")
    return placements


def span(size: int, degree: int, place: int) -> range:
    """The part of ``size`` indices that belongs to ``place`` of ``degree``: contiguous, sizes differ by one at most."""
    return range(size * place // degree, size * (place + 1) // degree)


class Shard(NamedTuple):
    """The rectangle of a parameter that a rank holds."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    placement: Placement
    across: tuple[
        int, ...
    ] = ()  # the pipeline ranks that hold it where they are several; see parallel/pipeline/stages.py

    @property
    def slices(self) -> tuple[slice, ...]:
        """What cuts it out of the whole."""
        return tuple(slice(first, first + size) for first, size in zip(self.offset, self.shape, strict=True))


def cut(shape: Sequence[int], placement: Placement, topology: Topology, rank: int) -> Shard:
    """The part of a parameter of global ``shape`` that ``rank`` holds."""
    offset, local = [0] * len(shape), list(shape)
    if placement.axis is not None:
        part = span(shape[placement.dim], topology.degree(placement.axis), topology.coordinate(rank, placement.axis))
        offset[placement.dim], local[placement.dim] = part.start, len(part)
    return Shard(tuple(shape), tuple(offset), tuple(local), placement)


def holders(placement: Placement, topology: Topology, rank: int, across: Sequence[int] = ()) -> tuple[int, ...]:
    """The ranks that hold the same part as ``rank``: they sum gradients and share the optimizer's state.

    ``across``: the pipeline ranks that do, where they are several.
    """
    own = topology.coordinate(rank, Axis.pp)
    group = topology.group(rank, placement.holders)
    return tuple(member + (other - own) * topology.stage_size for other in across or (own,) for member in group)
