"""Work without computation: a schedule's actions take the times that they are given, and memory is counted."""

import random

import pytest

from parallel.pipeline import idle
from parallel.pipeline.action import Action, Op, Overlap, parts
from parallel.pipeline.idle import Nothing, Waiting, time_actions
from parallel.pipeline.lower import lower
from parallel.pipeline.run import Interpreter
from parallel.pipeline.schedules import SCHEDULES, generate
from parallel.pipeline.simulate import Cost, simulate

F, B, I, W = Op
COST = Cost(F=2, B=5, I=3, W=2, FB=6)


class Clock:
    """Time passes when somebody sleeps, who then wakes late."""

    def __init__(self, late: float) -> None:
        self.now, self.late, self.random = 0.0, late, random.Random(0)  # noqa: S311

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late * self.random.uniform(0.5, 1.5)

    def read(self) -> float:
        return self.now


@pytest.mark.parametrize("name", SCHEDULES)
def test_actions_take_what_was_simulated(name: str) -> None:
    """The sides of a pair take its time together; a rank's actions take the time that it is busy."""
    schedule = generate(name, 4, 8)
    seconds = time_actions(schedule, COST, 1e-3)
    busy = simulate(schedule, COST).busy
    for rank, computes in enumerate(schedule.lists):
        spent = [[seconds[action] for action in parts(compute)] for compute in computes]
        assert sum(map(sum, spent)) == pytest.approx(float(busy[rank]) * 1e-3)
        for compute, sides in zip(computes, spent, strict=True):
            if isinstance(compute, Overlap):
                assert sum(sides) == pytest.approx((6 if compute.backward.op is B else 4) * 1e-3)
            else:
                assert sides == [getattr(COST, compute.op) * 1e-3]


@pytest.mark.parametrize("late", [0.0, 2e-4])
def test_who_wakes_late_lies_down_for_less(late: float, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(late)
    monkeypatch.setattr(idle, "sleep", clock.sleep)
    monkeypatch.setattr(idle, "perf_counter", clock.read)
    actions = [Action(F, 0, 0), Action(B, 0, 0)]
    work = Waiting(1, dict(zip(actions, (2e-3, 5e-3), strict=True)))
    for _ in range(100):
        work.spend(actions[0])
    before = clock.now
    for _ in range(1000):
        work.spend(actions[0])
        work.spend(actions[1])
    assert (clock.now - before) / 1000 == pytest.approx(7e-3, rel=1e-2)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb_h1", "zb_v", "dualpipev"])
def test_memory_is_what_was_simulated(name: str) -> None:
    schedule = generate(name, 1, 6)
    work = Nothing(schedule.stages)
    assert Interpreter(None).run(lower(schedule).lists[0], work)
    assert work.peak == simulate(schedule).peaks[0]
