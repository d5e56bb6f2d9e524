"""Work without computation: stages that take no time, to see what the interpreter costs, or a given time, to see
whether a schedule runs as simulated.

    Nothing     returns at once                         Waiting     returns when the action's time is over, asleep

What travels is real, if small: tensors of [1]. Ranks that sleep share a processor well: eight of them are timed on two
cores as if each had its own.
"""

from collections.abc import Iterable, Mapping
from time import perf_counter, sleep

import torch
from torch import Tensor

from parallel.pipeline.action import Action, Compute, Op, Overlap, Schedule
from parallel.pipeline.run import Work
from parallel.pipeline.simulate import Cost

RATE = 0.05  # of what an action's lateness differs from what was expected, how much is learnt
LIMIT = 1e-3  # seconds: what is later than this is no rule


class Nothing(Work):
    """Takes no time; ``peak``: the most activations that were alive."""

    def __init__(self, stages: int) -> None:
        """``stages``: of the whole pipeline; the last makes no activation, the first no gradient."""
        self._stages, self._live, self.peak = stages, 0, 0

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        """See ``Work``."""
        self._live += 1
        self.peak = max(self.peak, self._live)
        self.spend(Action(Op.F, stage, microbatch))
        return self.allocate(microbatch) if stage < self._stages - 1 else None

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        """See ``Work``."""
        self._live -= not split
        self.spend(Action(Op.I if split else Op.B, stage, microbatch))
        return self.allocate(microbatch) if stage else None

    def weight(self, stage: int, microbatch: int) -> None:
        """See ``Work``."""
        self._live -= 1
        self.spend(Action(Op.W, stage, microbatch))

    def finished(self, stage: int) -> None:
        """There is nothing to sum."""

    def allocate(self, microbatch: int) -> Tensor:
        """See ``Work``."""
        return torch.empty(1)

    def spend(self, action: Action) -> None:
        """The time of an action."""


class Sleeper:
    """Sleeps for a time that is right in the mean.

    Sleepers wake late, by what the machine has else to do. So the lateness is learnt, and they lie down for less. To be
    kept from step to step.
    """

    def __init__(self) -> None:
        self._late = 0.0  # seconds by which a sleeper wakes late

    def sleep(self, seconds: float) -> None:
        """Returns when ``seconds``, counted from now, are over."""
        start = perf_counter()
        sleep(max(0.0, seconds - self._late))
        late = perf_counter() - start - seconds
        self._late += RATE * min(max(late, -LIMIT), LIMIT)


class Waiting(Nothing):
    """The same, but an action takes its time."""

    def __init__(self, stages: int, seconds: Mapping[Action, float]) -> None:
        """``seconds``: how long each action takes."""
        super().__init__(stages)
        self._seconds, self._sleeper = seconds, Sleeper()

    def spend(self, action: Action) -> None:
        """Sleeps until the time of ``action`` is over."""
        self._sleeper.sleep(self._seconds[action])


def time_actions(schedule: Schedule, cost: Cost, second: float) -> dict[Action, float]:
    """The seconds of each action where a unit of ``cost`` takes ``second``. The sides of a pair share its time."""
    return dict(_time(schedule.lists, cost, second))


def _time(lists: Iterable[Iterable[Compute]], cost: Cost, second: float) -> Iterable[tuple[Action, float]]:
    costs = {op: float(getattr(cost, op)) * second for op in Op}
    for computes in lists:
        for compute in computes:
            if isinstance(compute, Overlap):
                forward, backward = compute
                # With I in place of B: FB - B + I, as it is simulated.
                pair = float(cost.pair - cost.B) * second + costs[backward.op]
                first = pair * costs[forward.op] / (costs[forward.op] + costs[backward.op])
                yield forward, first
                yield backward, pair - first
            else:
                yield compute, costs[compute.op]
