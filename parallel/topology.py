"""Who is where: rank arithmetic, and nothing else. Two views of the same ranks, the innermost axis varying fastest:

    dense view    (pp, dp, cp, tp)     attention, norms, embeddings, dense MLPs, shared experts
    expert view   (pp, edp, ep)        routed experts;   edp * ep == dp * cp * tp

    pp=1 dp=2 cp=1 tp=2, ep=2      rank       0   1   2   3
                                   dp, tp    0,0 0,1 1,0 1,1
                                   edp, ep   0,0 0,1 1,0 1,1      experts are folded over tp and dp, never split by tp

Consecutive ranks share a node, so tp and ep, the axes that talk most, stay inside one. An expert group never leaves its
pipeline stage. Beside the axes of the views, four unions of dense axes name a group each: see ``Axis``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Axis(StrEnum):
    """What a group of ranks has in common: its members differ in this axis (or in these axes) only."""

    pp = "pp"
    dp = "dp"
    cp = "cp"
    tp = "tp"
    edp = "edp"  # holders of the same routed experts
    ep = "ep"
    replicas = "replicas"  # dp, cp: holders of the same slice of a weight that is split over tp
    sequence = "sequence"  # cp, tp: shards of the same sequences
    stage = "stage"  # dp, cp, tp: holders of a parameter that every rank of its stage has whole
    world = "world"


@dataclass(frozen=True, slots=True)
class Topology:
    """The five degrees. Raises ValueError for a degree below 1 and for an ``ep`` that does not divide its stage."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in ("pp", "dp", "cp", "tp", "ep"):
            if getattr(self, axis) < 1:
                raise ValueError(f"parallel.{axis}={getattr(self, axis)} must be at least 1")
        if self.stage_size % self.ep:
            raise ValueError(
                f"parallel.ep={self.ep} must divide dp*cp*tp = {self.dp}*{self.cp}*{self.tp} = {self.stage_size}"
            )

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def edp(self) -> int:
        """How often each routed expert is held."""
        return self.stage_size // self.ep

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.stage_size

    def degree(self, axis: Axis) -> int:
        """Ranks in a group of ``axis``."""
        return self._step(axis)[0]

    def coordinate(self, rank: int, axis: Axis) -> int:
        """The place of ``rank`` in its group of ``axis``: ``group(rank, axis)[coordinate] == rank``."""
        size, stride = self._step(axis)
        return rank // stride % size

    def group(self, rank: int, axis: Axis) -> tuple[int, ...]:
        """The ranks, ascending, that share everything with ``rank`` but their place on ``axis``."""
        size, stride = self._step(axis)
        first = rank - rank // stride % size * stride
        return tuple(range(first, first + size * stride, stride))

    def groups(self, axis: Axis) -> Iterator[tuple[int, ...]]:
        """Every group of ``axis``, by its first rank; together they hold each rank once."""
        size, stride = self._step(axis)
        for block in range(0, self.world, size * stride):
            for first in range(block, block + stride):
                yield tuple(range(first, first + size * stride, stride))

    def _step(self, axis: Axis) -> tuple[int, int]:
        """Ranks in a group, and the distance between neighbours: a union joins axes that lie side by side."""
        return {
            Axis.pp: (self.pp, self.stage_size),
            Axis.dp: (self.dp, self.cp * self.tp),
            Axis.cp: (self.cp, self.tp),
            Axis.tp: (self.tp, 1),
            Axis.edp: (self.edp, self.ep),
            Axis.ep: (self.ep, 1),
            Axis.replicas: (self.dp * self.cp, self.tp),
            Axis.sequence: (self.cp * self.tp, 1),
            Axis.stage: (self.stage_size, 1),
            Axis.world: (self.world, 1),
        }[axis]


def arrange(world: int, *, pp: int = 1, dp: int | None = None, cp: int = 1, tp: int = 1, ep: int = 1) -> Topology:
    """The topology of ``world`` ranks; ``dp`` takes what the other axes leave. ValueError where they do not fit."""
    others = pp * cp * tp
    if dp is None:
        if world % others:
            raise ValueError(
                f"parallel.pp*cp*tp = {pp}*{cp}*{tp} = {others} must divide the number of ranks, {world}; "
                "start a multiple of it, or lower one of them"
            )
        dp = world // others
    topology = Topology(pp=pp, dp=dp, cp=cp, tp=tp, ep=ep)
    if topology.world != world:
        raise ValueError(
            f"parallel.pp*dp*cp*tp = {pp}*{dp}*{cp}*{tp} = {topology.world} must equal the number of ranks, {world}"
        )
    return topology
