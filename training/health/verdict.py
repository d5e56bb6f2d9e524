"""What heartbeats of all ranks together say: who is stuck and who waits for it, who is slow. Pure functions.

hang    nobody has gone on for so long.    no sign of life           it is stopped, dead or cut off
                                           works, and does not wait  it is stuck in that
                                           waits, as all others do   each for another: a fault of the program
slow    a rank computes for much more of its time than the others, who wait for it
"""

from collections.abc import Collection, Mapping, Sequence
from statistics import median
from typing import NamedTuple

from training.health.beat import Beat

SECOND = 10**9  # ns


class Hang(NamedTuple):
    """A run that does not go on."""

    stuck: tuple[int, ...]  # the ranks to look at
    lines: tuple[str, ...]  # what every rank does, the stuck ones first

    def describe(self) -> str:
        """In a line."""
        return self.lines[0]


def find_hang(
    beats: Mapping[int, Beat | None], now: int, patience: float, beat_every: float, stopped: Collection[int] = ()
) -> Hang | None:
    """The hang of ranks whose last heartbeats are ``beats``; None if one has gone on within ``patience`` seconds, or is
    where nobody is to hurry it. ``now``: ns. ``stopped``: those that are known to be stopped by a signal.
    """
    silent = {rank for rank, beat in beats.items() if beat is None or now - beat.time > 3 * beat_every * SECOND}
    alive = [beat for rank, beat in beats.items() if beat is not None and rank not in silent]
    if any(not beat.watched or now - beat.since < patience * SECOND for beat in alive):
        return None
    busy = {beat.rank for beat in alive if not beat.waiting}
    stuck = silent or busy
    waiting = sorted(beats.keys() - stuck)
    order = [*sorted(stuck), *waiting]
    whom = "no rank computes: each waits for another" if not stuck else _list(sorted(stuck), "stuck")
    behind = f"; {_list(waiting, 'waiting for it')}" if stuck and waiting else ""
    head = f"no rank has gone on for {patience:g} s: {whom}{behind}"
    lines = [
        _tell(rank, beats[rank], rank in silent, now) + ": it is stopped by a signal" * (rank in stopped)
        for rank in order
    ]
    return Hang(tuple(sorted(stuck)), (head, *lines))


class Slow(NamedTuple):
    """A rank that others wait for."""

    rank: int
    busy: float  # share of its time
    others: float  # median of theirs

    def describe(self) -> str:
        """In a line."""
        return (
            f"rank {self.rank} is slow, or has more to do: it computes {self.busy:.0%} of its time, the others "
            f"{self.others:.0%} and wait for it"
        )


def find_slow(beats: Sequence[Beat], factor: float) -> Slow | None:
    """The rank that computes more than ``factor`` times as much as the median of the others; None if there is none."""
    if len(beats) < 2 or any(beat.busy < 0 for beat in beats):
        return None
    worst = max(beats, key=lambda beat: beat.busy)
    others = median(beat.busy for beat in beats if beat is not worst)
    return Slow(worst.rank, worst.busy, others) if worst.busy > factor * others else None


def _tell(rank: int, beat: Beat | None, silent: bool, now: int) -> str:
    if beat is None:
        return f"rank {rank}: never gave a sign of life"
    doing = f"{'waits in' if beat.waiting else 'is at'} {beat.action} for {(now - beat.since) / SECOND:.0f} s"
    sign = f", and has given no sign of life for {(now - beat.time) / SECOND:.0f} s" if silent else ""
    return f"rank {rank} on {beat.node} (process {beat.pid}): {doing}{sign}"


def _list(ranks: Sequence[int], what: str) -> str:
    few = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {few} {'are' if len(ranks) > 1 else 'is'} {what}"
