"""What engines and schedules cannot do, refused by name before anything is built. Standard library only."""

from collections.abc import Callable
from importlib.util import find_spec

from model.config import Recompute
from parallel.config import EngineName, ParallelConfig, TensorOverlap, check_multiprocessors
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.schedules import check as check_schedule
from training.config import TILES, Compile, Device, MomentDtype, OptimizerConfig, Precision, RunSection
from training.ramp import count_microbatches, schedule_batches

DEEPSPEED = (EngineName.zero1, EngineName.zero2, EngineName.zero3)


def check(engine: EngineName, precision: Precision, optimizer: OptimizerConfig, recompute: Recompute) -> None:
    """Raises ValueError if ``engine`` cannot train in ``precision``, run ``optimizer`` or ``recompute``."""
    if engine is EngineName.fsdp2 and recompute is not Recompute.none:
        raise ValueError(
            f"model.recompute={recompute} must be none with parallel.engine={engine}: fully_shard's units "
            "lie within what would be computed again"
        )
    if engine not in DEEPSPEED:
        return
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"parallel.engine={engine} needs DeepSpeed, which is not installed; install deepspeed, or take "
            "parallel.engine=native, which does ZeRO-1 by itself"
        )
    if precision in TILES and engine is EngineName.zero3:
        raise ValueError(
            f"parallel.engine={engine} must be another one with precision={precision}: experts in FP8 read weights "
            "that ZeRO-3 gathers for calls they do not make"
        )
    if precision is Precision.fp64:
        raise ValueError(
            f"parallel.engine={engine} must be native or fsdp2 with precision={precision}: DeepSpeed casts master "
            "weights and gradients to float32"
        )
    if optimizer.moments is not MomentDtype.master:
        raise ValueError(
            f"optimizer.moments={optimizer.moments} must be master with parallel.engine={engine}: the AdamW that "
            "DeepSpeed steps keeps moments in the dtype of the masters"
        )


def check_microbatches(parallel: ParallelConfig, run: RunSection, sequence_length: int, replicas: int) -> None:
    """Raises ValueError, naming the first step, if a schedule by name cannot take the micro-batches of every batch."""
    p = parallel.pipeline
    if p.file is not None:
        return
    name = parallel.schedule
    try_batches(run, sequence_length, replicas, lambda count: check_schedule(name, parallel.pp, count, p.virtual))


def try_batches(run: RunSection, sequence_length: int, replicas: int, take: Callable[[int], object]) -> None:
    """Calls ``take`` with the micro-batches of every batch of a run; its ValueError then names the first step."""
    levels = schedule_batches(run, sequence_length).levels
    for level in levels:
        try:
            take(count_microbatches(level.batch, run.micro_batch, replicas))
        except ValueError as error:
            where = f"; so in step {level.step}, whose batch is {level.batch} by run.ramp" if len(levels) > 1 else ""
            raise ValueError(f"{error}{where}") from None


def check_overlap(parallel: ParallelConfig, device: Device) -> None:
    """Raises ValueError for overlap that ``device`` has nothing for. What else is missing shows where ranks start."""
    check_multiprocessors(parallel.overlap.multiprocessors, device)
    if parallel.tp > 1 and parallel.overlap.tensor is TensorOverlap.fused and device is Device.cpu:
        raise ValueError(
            "parallel.overlap.tensor=fused must be auto, joined or blocks with run.device=cpu: torch's fused operators "
            "are for NVIDIA devices joined by NVLink"
        )


def check_splits(parallel: ParallelConfig, choice: Compile) -> None:
    """Raises ValueError if what must be compiled follows one of the known schedules that split backwards."""
    if parallel.pipeline.file is None:
        name = parallel.schedule
        check_compile(choice, f"parallel.pipeline.schedule={name}", SCHEDULES[name].splits)


def check_compile(choice: Compile, schedule: str, splits: bool) -> None:
    """Raises ValueError if what must be compiled follows a schedule that ``splits`` backwards."""
    if choice is Compile.on and splits:
        raise ValueError(
            f"run.compile=on must be auto or off with {schedule}, which splits backwards: compiled segments compute "
            "all gradients at once"
        )
