"""A layout of few ranks that stands for one of many."""

from collections.abc import Sequence
from dataclasses import replace

from parallel.config import ParallelConfig
from parallel.pipeline.schedules import SCHEDULES
from parallel.topology import Topology

RANKS = 16
LENGTH = 4  # of a pipeline: ends, and something between them


def list_lengths(parallel: ParallelConfig) -> Sequence[int]:
    """The numbers of pipeline ranks that can stand for ``parallel.pp``: those that its schedule takes."""
    if parallel.pp == 1 or parallel.pipeline.file is not None:
        return (parallel.pp,)
    return range(2, parallel.pp + 1, 2 if SCHEDULES[parallel.schedule].even else 1)


def lower(topology: Topology, experts: int, lengths: Sequence[int] = (1,)) -> tuple[Topology, list[str]]:
    """A layout of at most ``RANKS`` ranks like ``topology``, and what of it is not proved, in words.

    Every axis that had several ranks keeps several, and so do the holders of an expert, as far as that is possible; a
    pipeline, of one of ``lengths``, keeps ``LENGTH`` before dp and ep are kept large. Raises ValueError where tp
    alone, or with the shortest pipeline, is more than ``RANKS``.
    """
    if topology.world <= RANKS:
        return topology, []
    shards, shortest = topology.tp * topology.cp, min(lengths)
    if shortest > RANKS:
        raise ValueError(
            f"parallel.pp={topology.pp} must be at most {RANKS} to be proved on one machine with a schedule of your "
            "own; verify=skip trains without a proof"
        )
    if shards * shortest > RANKS:
        raise ValueError(
            f"parallel.tp={topology.tp} must be at most {RANKS // shortest} to be proved on one machine"
            f"{' with a pipeline' if shortest > 1 else ''}; verify=skip trains without a proof"
        )
    small = max(
        (
            replace(topology, pp=pp, dp=dp, ep=ep)
            for pp in lengths
            for dp in _divisors(topology.dp, RANKS // (pp * shards))
            for ep in _divisors(topology.ep, dp * shards)
            if dp * shards % ep == 0 and experts % ep == 0
        ),
        key=lambda t: _rate(t, topology),
    )
    lowered = [
        f"parallel.{axis}={getattr(topology, axis)}: proved with {getattr(small, axis)}"
        for axis in ("pp", "dp", "ep")
        if getattr(topology, axis) != getattr(small, axis)
    ]
    return small, lowered


def _rate(small: Topology, large: Topology) -> tuple[int, ...]:
    """The higher, the better ``small`` stands for ``large``."""
    kept = sum((getattr(small, axis) > 1) == (getattr(large, axis) > 1) for axis in ("dp", "ep", "edp"))
    return kept, min(small.pp, LENGTH), small.dp, small.ep, small.pp


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
