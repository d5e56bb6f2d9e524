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
from parallel.pipeline.prove import prove
from parallel.pipeline.schedules import SCHEDULES, evaluate, generate
from parallel.pipeline.stages import Pipeline, divide
from parallel.pipeline.validate import validate


@cache
def make_schedule(name: str, file: str | None, ranks: int, microbatches: int, virtual: int) -> Schedule:
    """A valid schedule. Raises ValueError for numbers that its rule forbids, and for a file that does not fit them."""
    if file is not None:
        return _load(file, ranks, microbatches)
    schedule = generate(name, ranks, microbatches, virtual)
    validate(schedule)
    return schedule


def _load(file: str, ranks: int, microbatches: int) -> Schedule:
    """A schedule of one's own, valid and for these numbers."""
    try:
        schedule = text.load(Path(file))
    except ValueError as error:  # begins with the path
        raise ValueError(f"parallel.pipeline.file={error}") from None
    if (schedule.ranks, schedule.microbatches) != (ranks, microbatches):
        raise ValueError(
            f"parallel.pipeline.file={file} is for {schedule.ranks} ranks and {schedule.microbatches} "
            f"micro-batches, the run has parallel.pp={ranks} and {microbatches}: change run.micro_batch, "
            "run.global_batch or parallel.pp"
        )
    if not _has(schedule, Op.B, Op.I):
        raise ValueError(f"parallel.pipeline.file={file} has no backward: it evaluates, and cannot train")
    try:
        validate(schedule)
    except ValueError as error:
        raise ValueError(f"parallel.pipeline.file={file}: {error}") from None
    return schedule


def schedule_of(parallel: ParallelConfig, microbatches: int) -> Schedule:
    """What a step of ``microbatches`` follows. ValueError as in ``make_schedule``."""
    p = parallel.pipeline
    return make_schedule(parallel.schedule, p.file, parallel.pp, microbatches, p.virtual)


def program(parallel: ParallelConfig, microbatches: int) -> Program:
    """The programs of a step of ``microbatches``."""
    p = parallel.pipeline
    return _make_program(parallel.schedule, p.file, parallel.pp, microbatches, p.virtual)


@cache
def _make_program(name: str, file: str | None, ranks: int, microbatches: int, virtual: int) -> Program:
    return _lower(make_schedule(name, file, ranks, microbatches, virtual))


def _lower(schedule: Schedule) -> Program:
    """Programs that are known to end before anybody runs them."""
    lowered = lower(schedule)
    prove(lowered)
    return lowered


def divide_model(parallel: ParallelConfig, model: ModelConfig, schedule: Schedule) -> Pipeline:
    """Which layers are a stage, and where stages are, which is the same for any number of micro-batches.

    Raises ValueError where there are more stages than layers, where ``parallel.pipeline.layers`` does not divide them,
    and where experts should move that have copies.
    """
    if parallel.rebalance_every and any(len(holders) > 1 for holders in schedule.stage_map.holders_of):
        raise ValueError(
            f"parallel.rebalance_every={parallel.rebalance_every} must be 0 with the schedule {schedule.name}: experts "
            "of stages that have copies do not move"
        )
    return Pipeline(divide(model, schedule.stages, parallel.pipeline.layers), schedule.stage_map)


@cache
def evaluation(pipeline: Pipeline, microbatches: int) -> Program:
    """Forwards alone, over the same stages."""
    return _lower(evaluate(pipeline.stage_map, microbatches))


def splits_backward(parallel: ParallelConfig) -> bool:
    """Whether weight gradients are computed apart from input gradients. ValueError for a file that is no schedule."""
    p = parallel.pipeline
    if p.file is None:
        return SCHEDULES[parallel.schedule].splits
    return _has(text.load(Path(p.file)), Op.W)


def _has(schedule: Schedule, *ops: Op) -> bool:
    return any(action.op in ops for computes in schedule.lists for compute in computes for action in parts(compute))
