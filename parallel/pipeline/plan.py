"""The pipeline of a run: its schedule for every number of micro-batches, lowered and validated, and its stages.

parallel.pipeline.schedule, .virtual, or a schedule of one's own from .file  -->  Schedule  -->  Program
parallel.pipeline.layers, or a division by cost                              -->  which layers are a stage
"""

from functools import cache
from pathlib import Path

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.pipeline import text
from parallel.pipeline.action import Op, Schedule, parts
from parallel.pipeline.lower import Program, lower
from parallel.pipeline.schedules import evaluate, generate
from parallel.pipeline.stages import Pipeline, divide
from parallel.pipeline.validate import validate


@cache
def make_schedule(name: str, file: str | None, ranks: int, microbatches: int, virtual: int) -> Schedule:
    """A valid schedule. Raises ValueError for numbers that its rule forbids, and for a file that does not fit them."""
    if file is None:
        schedule = generate(name, ranks, microbatches, virtual)
    else:
        schedule = text.load(Path(file))
        if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
            raise ValueError(
                f"parallel.pipeline.file={file} is for {schedule.ranks} ranks and {schedule.microbatches} "
                f"micro-batches, the run has parallel.pp={ranks} and {microbatches}: change run.micro_batch, "
                "run.global_batch or parallel.pp"
            )
    validate(schedule)
    return schedule


def schedule_of(parallel: ParallelConfig, microbatches: int) -> Schedule:
    """What a step of ``microbatches`` follows. ValueError as in ``make_schedule``."""
    p = parallel.pipeline
    return make_schedule(p.schedule, p.file, parallel.pp, microbatches, p.virtual)


def program(parallel: ParallelConfig, microbatches: int) -> Program:
    """The programs of a step of ``microbatches``."""
    p = parallel.pipeline
    return _make_program(p.schedule, p.file, parallel.pp, microbatches, p.virtual)


@cache
def _make_program(name: str, file: str | None, ranks: int, microbatches: int, virtual: int) -> Program:
    return lower(make_schedule(name, file, ranks, microbatches, virtual))


def divide_model(parallel: ParallelConfig, model: ModelConfig, schedule: Schedule) -> Pipeline:
    """Which layers are a stage, and where stages are, which is the same for any number of micro-batches.

    Raises ValueError where there are more stages than layers, or ``parallel.pipeline.layers`` does not divide them.
    """
    return Pipeline(divide(model, schedule.stages, parallel.pipeline.layers), schedule.stage_map)


@cache
def evaluation(pipeline: Pipeline, microbatches: int) -> Program:
    """Forwards alone, over the same stages."""
    return lower(evaluate(pipeline.stage_map, microbatches))


def splits_backward(schedule: Schedule) -> bool:
    """Whether weight gradients are computed apart from input gradients."""
    return any(action.op is Op.W for actions in schedule.lists for compute in actions for action in parts(compute))
