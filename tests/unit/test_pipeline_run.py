"""The interpreter on one rank: it does what the program says, and hands on what stages make."""

import pytest
import torch
from torch import Tensor

from parallel.pipeline.action import Action, Op, parts
from parallel.pipeline.lower import lower
from parallel.pipeline.run import Interpreter, Work
from parallel.pipeline.schedules import generate
from parallel.pipeline.trace import Span


class Numbers(Work):
    """A ``Work`` whose stages add one to a micro-batch's number, there and back."""

    def __init__(self, stages: int) -> None:
        self.stages, self.done = stages, list[object]()

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        self.done.append(Action(Op.F, stage, microbatch))
        assert (x is None) == (stage == 0) and (x is None or x.item() == 100 * microbatch + stage)
        return None if stage == self.stages - 1 else torch.tensor(100.0 * microbatch + stage + 1)

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        self.done.append(Action(Op.I if split else Op.B, stage, microbatch))
        assert (gradient is None) == (stage == self.stages - 1)
        assert gradient is None or gradient.item() == 100 * microbatch + stage + 1
        return torch.tensor(100.0 * microbatch + stage) if stage else None

    def weight(self, stage: int, microbatch: int) -> None:
        self.done.append(Action(Op.W, stage, microbatch))

    def finished(self, stage: int) -> None:
        self.done.append(stage)

    def allocate(self, microbatch: int) -> Tensor:
        raise AssertionError("nothing is received")


@pytest.mark.parametrize(
    ("name", "virtual", "stages"),
    [("1f1b", 1, 1), ("gpipe", 1, 1), ("zb_h1", 1, 1), ("interleaved_1f1b", 3, 3), ("zb_v", 1, 2), ("dualpipev", 1, 2)],
)
def test_a_rank_alone_does_all(name: str, virtual: int, stages: int) -> None:
    schedule = generate(name, 1, 4, virtual)
    planned = [part for compute in schedule.lists[0] for part in parts(compute)]
    interpreter, spans = Interpreter(None), list[Span]()
    for _ in range(2):
        work = Numbers(stages)
        assert interpreter.run(lower(schedule).lists[0], work, spans=spans)
        assert [action for action in work.done if isinstance(action, Action)] == planned
        for stage in range(stages):
            at = work.done.index(stage)
            of = [
                number for number, action in enumerate(work.done) if isinstance(action, Action) and action[1] == stage
            ]
            assert work.done.count(stage) == 1 and at > of[-1], "a stage is finished once, after all it does"
        assert not interpreter._held and not interpreter._leaving
    assert [span.action for span in spans] == list(schedule.lists[0]) * 2


@pytest.mark.parametrize("forwards", range(4))
def test_stops_before_a_forward_and_holds_nothing(forwards: int) -> None:
    """Then it can go on with another step."""
    steps = lower(generate("interleaved_1f1b", 1, 2, 2)).lists[0]
    interpreter, work, answers = Interpreter(None), Numbers(2), iter([False] * forwards + [True])
    assert not interpreter.run(steps, work, stop=lambda: next(answers))
    assert sum(isinstance(action, Action) and action.op is Op.F for action in work.done) == forwards
    assert not interpreter._held and not interpreter._leaving
    assert interpreter.run(steps, Numbers(2), stop=lambda: False)
