"""How far apart checkpoints are, so that the least time is lost: to saving them, and to steps that are taken again.

A run that waits ``stall`` for each checkpoint and fails every ``failure`` on average loses, of every second,

    stall / T  to saving  +  T / (2 failure)  to steps taken again,    least for  T = sqrt(2 stall failure)

(Young, A first order approximation to the optimum checkpoint interval, 1974; Daly 2006 adds terms that are small where
``stall`` is). Standard library only.
"""

import math
from time import monotonic

from training.config import CheckpointConfig


class Clock:
    """When the next checkpoint is due, and how long this one takes."""

    def __init__(self, how: CheckpointConfig, devices: int) -> None:
        """``devices`` train together: any of them may fail."""
        self._auto, self._failure = how.auto, 3600 * how.device_hours / devices
        self._wait = math.inf if how.minutes is None else 60 * how.minutes
        self._began = monotonic()

    def now(self) -> float:
        """Seconds since some time."""
        return monotonic()

    def is_over(self) -> bool:
        """Whether a checkpoint is due."""
        return monotonic() - self._began >= self._wait

    def begin(self) -> None:
        """The next one is waited for from now on."""
        self._began = monotonic()

    def follow(self, stall: float, writing: float) -> str:
        """The run waited ``stall`` seconds for the last one, which was there after ``writing``: a word on the next."""
        if not self._auto:
            return ""
        self._wait = choose_interval(stall, writing, self._failure)
        return f"; the next one in {self._wait:.1f} s"


def choose_interval(stall: float, writing: float, failure: float) -> float:
    """Seconds from one checkpoint to the next.

    ``stall``: that the run waits for one; ``writing``: until one is on disk, before which none begins; ``failure``:
    between failures, on average. All in seconds.
    """
    return max(writing, math.sqrt(2 * stall * failure))


def choose_best(
    best: tuple[tuple[float, int], ...], loss: float, step: int, keep: int
) -> tuple[tuple[float, int], ...]:
    """The ``keep`` lowest losses and their steps, of ``best`` and an evaluation after ``step``; NaN is never low."""
    return tuple(sorted((*best, (loss, step)) if math.isfinite(loss) else best)[:keep])
