"""A step of a rank alone in its pipeline, in every way that a step may be run: all of them give the same bits."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Batch, Denominators
from model.transformer import Transformer
from parallel.overlap.lanes import Lanes
from parallel.pipeline.lower import lower
from parallel.pipeline.run import Interpreter
from parallel.pipeline.schedules import generate
from training.proof.unaided import Unaided
from training.work import Mode, Shapes, Sums, Training


class Way(NamedTuple):
    """A schedule of one rank, and how it is run."""

    schedule: str
    mode: Mode = Mode()


IN_TURNS = Mode(overlap=False)
# Of one stage, and of two.
ONE = {
    "autograd": Way("1f1b", IN_TURNS),
    "filled": Way("1f1b"),
    "in turns": Way("interleaved_1f1b_overlap", IN_TURNS),
    "overlapped": Way("interleaved_1f1b_overlap", Mode(fill=False)),
    "overlapped and filled": Way("interleaved_1f1b_overlap"),
    "split": Way("zb_h1", IN_TURNS),
    "split, overlapping": Way("zb_h1"),
}
TWO = {
    "autograd": Way("interleaved_1f1b", IN_TURNS),
    "filled": Way("interleaved_1f1b"),
    "in turns": Way("dualpipev", IN_TURNS),
    "overlapped": Way("dualpipev", Mode(fill=False)),
    "overlapped and filled": Way("dualpipev"),
    "split": Way("zb_v", IN_TURNS),
    "split, overlapping": Way("zb_v"),
}


class Taken(NamedTuple):
    """What a step came to."""

    sums: Sums
    gradients: dict[str, Tensor | None]


def take_step(
    stages: Mapping[int, Transformer],
    batches: list[Batch],
    denominators: Denominators,
    way: Way,
    lanes: Lanes | None = None,
) -> Taken:
    """Forward and backward of every micro-batch; gradients are summed here alone. ``lanes``: of the exchanges."""
    virtual = len(stages) if way.schedule.startswith("interleaved") else 1
    steps = lower(generate(way.schedule, 1, len(batches), virtual)).lists[0]
    model = stages[0]
    weight = next(model.parameters())
    length = batches[0].ids.shape[1] - 1 - model.config.mtp.depth
    shapes = Shapes(length, model.config.hidden, 1 + model.config.mtp.depth, weight.dtype, weight.device)
    work = Training(Unaided(dict(stages), batches), batches, denominators, shapes, steps, way.mode)
    if lanes is not None:
        lanes.idle = work.idle
    assert Interpreter(None).run(steps, work)
    assert work.sums is not None
    parameters = {name: parameter for part in stages.values() for name, parameter in part.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    return Taken(work.sums, gradients)


def find_differences(one: Taken, other: Taken) -> list[str]:
    """What is not the same to the bit."""
    wrong = [name for name, a, b in zip(Sums._fields, one.sums, other.sums, strict=True) if not torch.equal(a, b)]
    for name, gradient in one.gradients.items():
        theirs = other.gradients[name]
        same = gradient is theirs is None or (
            gradient is not None and theirs is not None and torch.equal(gradient, theirs)
        )
        wrong += [] if same else [name]
    return wrong
