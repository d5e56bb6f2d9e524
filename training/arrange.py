"""The stages of a run, and whether its schedule takes every number of micro-batches that its batches make. No torch.

batches of run.ramp -> micro-batches of a replica -> a valid schedule for as many -> which layers are a stage, where
"""

from configs.schema import TrainConfig
from parallel.pipeline.action import Schedule
from parallel.pipeline.plan import divide_model, schedule_of, splits_backward
from parallel.pipeline.stages import Pipeline
from training.ramp import count_microbatches
from training.support import check_compile, try_batches


def take_schedule(config: TrainConfig, replicas: int) -> Schedule:
    """What a step of the full batch follows. ValueError as ``arrange_stages``."""
    return schedule_of(config.parallel, count_microbatches(config.run.global_batch, config.run.micro_batch, replicas))


def arrange_stages(config: TrainConfig, replicas: int) -> Pipeline:
    """Which layers are a stage, and who has it: the same for every size of the batch.

    Raises ValueError for a number of micro-batches that the schedule cannot take, naming the step, for layers that do
    not make its stages, and for a file that is no schedule or cannot train.
    """
    try_batches(config.run, config.data.sequence_length, replicas, lambda count: schedule_of(config.parallel, count))
    schedule = take_schedule(config, replicas)
    check_compile(config.run.compile, f"the schedule {schedule.name}", splits_backward(config.parallel))
    return divide_model(config.parallel, config.model, schedule)
