"""Configuration of the parallel layout: the five degrees, the pipeline and the engine. Standard library only."""

from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum

from parallel.pipeline.schedules import SCHEDULES, Route

ScheduleName = StrEnum("ScheduleName", tuple(SCHEDULES))  # type: ignore[misc]


class EngineName(StrEnum):
    """Who sums gradients over ranks and owns the optimizer's state."""

    native = "native"  # ZeRO-1 of our own
    fsdp2 = "fsdp2"  # torch's fully_shard: weights are sharded too (ZeRO-3)
    zero1 = "zero1"  # DeepSpeed's ZeRO-1
    zero2 = "zero2"  # DeepSpeed's ZeRO-2: gradients are sharded too
    zero3 = "zero3"  # DeepSpeed's ZeRO-3: weights are sharded too, over dp alone


@dataclass(kw_only=True, slots=True)
class PipelineConfig:
    """How ranks share the work of a step: ``shoestring schedule`` shows it before it runs."""

    schedule: ScheduleName | None = None  # which rank computes what when; null: what suits the layout, docs/pipeline.md
    virtual: int = 1  # stages a rank, where the schedule takes any number
    layers: tuple[int, ...] | None = None  # of each stage; null: such that stages cost about the same
    file: str | None = None  # a schedule of your own, a line a rank, in place of schedule and virtual

    def __post_init__(self) -> None:
        if self.virtual < 1:
            raise ValueError(f"parallel.pipeline.virtual={self.virtual} must be at least 1")
        if self.file is not None and self.virtual > 1:
            raise ValueError(
                f"parallel.pipeline.virtual={self.virtual} must be left out: parallel.pipeline.file={self.file} says "
                "what each rank does"
            )


class TensorOverlap(StrEnum):
    """How exchanges between tp ranks and the products beside them go together: parallel/collective_matmul.py."""

    auto = "auto"  # fused where that can be, else blocks on a CPU and joined on what was not measured
    joined = "joined"  # one after the other
    blocks = "blocks"  # block by block, one travels while another is multiplied
    fused = "fused"  # torch's symmetric-memory operators: CUDA with NVLink


@dataclass(kw_only=True, slots=True)
class OverlapConfig:
    """What is sent while something else is computed."""

    experts: bool = True  # tokens travel to experts while pairs of a schedule, or weight gradients, are computed
    tensor: TensorOverlap = TensorOverlap.auto  # exchanges of tp and the products beside them
    pieces: int = 1  # in which tokens go to their experts, who start on the first
    multiprocessors: int = 0  # of a GPU, that products leave to collectives, which take no more; 0: no rule

    def __post_init__(self) -> None:
        if self.multiprocessors < 0:
            raise ValueError(f"parallel.overlap.multiprocessors={self.multiprocessors} must not be negative")
        if self.pieces < 1:
            raise ValueError(f"parallel.overlap.pieces={self.pieces} must be at least 1")


def check_multiprocessors(count: int, device: str) -> None:
    """Raises ValueError where ``device``, a torch type or ``auto``, has none that ``OverlapConfig`` could leave."""
    if count and device not in ("auto", "cuda"):
        raise ValueError(
            f"parallel.overlap.multiprocessors={count} must be 0 with run.device={device}: there are none to leave to "
            "communication"
        )


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How many ways each axis splits the work. ``dp`` defaults to what the other axes leave of the world."""

    pp: int = 1  # pipeline stages
    dp: int | None = None  # data-parallel replicas; null: what the others leave of the ranks
    cp: int = 1  # context: a sequence over ranks
    tp: int = 1  # tensor: a layer over ranks
    ep: int = 1  # expert: routed experts over dp * cp * tp ranks
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    engine: EngineName = EngineName.native  # who reduces gradients and keeps the optimizer's state
    timeout: float = 1800.0  # seconds that ranks wait for each other: while one prepares text, above all
    rebalance_every: int = 0  # steps between moves of experts to even out ranks' loads; 0: experts stay

    def __post_init__(self) -> None:
        for axis in ("pp", "dp", "cp", "tp", "ep"):
            degree = getattr(self, axis)
            if degree is not None and degree < 1:
                raise ValueError(f"parallel.{axis}={degree} must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"parallel.timeout={self.timeout} must be positive")
        if self.rebalance_every < 0:
            raise ValueError(f"parallel.rebalance_every={self.rebalance_every} must not be negative")
        if self.rebalance_every and self.engine is not EngineName.native:
            raise ValueError(
                f"parallel.rebalance_every={self.rebalance_every} needs parallel.engine=native: {self.engine} does not "
                "move experts"
            )
        self._check_zero3()
        self._check_pipeline()
        if self.cp > 1:
            raise ValueError(f"parallel.cp={self.cp} must be 1: there is no context parallelism yet")

    @property
    def patience(self) -> timedelta:
        """``timeout``, as torch takes it."""
        return timedelta(seconds=self.timeout)

    @property
    def schedule(self) -> ScheduleName:
        """Of the pipeline, whose file is not asked. Where nothing is said, by what the layout sends:

            experts on other ranks, and one rank or several stages a rank      interleaved_1f1b_overlap
            several stages a rank                                              interleaved_1f1b
            else                                                               1f1b

        A pair costs the activations of one more micro-batch. With several ranks of one stage each it would be P more,
        and weight gradients alone hide what they can; engines other than native run no pairs.
        """
        p = self.pipeline
        if p.schedule is not None:
            return p.schedule
        paired = self.ep > 1 and self.engine is EngineName.native and (self.pp == 1 or p.virtual > 1)
        rule = "interleaved_1f1b_overlap" if paired else "interleaved_1f1b" if p.virtual > 1 else "1f1b"
        return ScheduleName[rule]

    def name_schedule(self) -> str:
        """The schedule in words."""
        p = self.pipeline
        if p.file is not None:
            return f"the schedule of {p.file}"
        return self.schedule + (f" of {p.virtual} stages a rank" if p.virtual > 1 else "")

    def _check_zero3(self) -> None:
        """What DeepSpeed's ZeRO-3 runs: replicas of one stage that hold everything alike."""
        if self.engine is not EngineName.zero3:
            return
        for axis in ("pp", "tp", "ep", "cp"):
            if (degree := getattr(self, axis)) > 1:
                raise ValueError(
                    f"parallel.{axis}={degree} must be 1 with parallel.engine=zero3: DeepSpeed's ZeRO-3 knows one "
                    "group of ranks, which hold everything alike; take fsdp2"
                )
        if self.schedule != "1f1b":
            raise ValueError(
                f"parallel.pipeline.schedule={self.schedule} must be 1f1b with parallel.engine=zero3: it "
                "gathers weights in the order of a forward and its own backward"
            )

    def _check_pipeline(self) -> None:
        """What of a pipeline goes with which engine, and with moving experts."""
        schedule, file = self.schedule, self.pipeline.file
        if self.engine is not EngineName.native and file is not None:
            raise ValueError(
                f"parallel.pipeline.file={file} must be left out with parallel.engine={self.engine}: only native runs "
                "schedules of your own"
            )
        if self.engine is not EngineName.native and (reason := SCHEDULES[schedule].needs_native()):
            whole = [name for name, each in SCHEDULES.items() if not each.needs_native()]
            raise ValueError(
                f"parallel.pipeline.schedule={schedule} must be one of {', '.join(whole)} with "
                f"parallel.engine={self.engine}: {reason}"
            )
        if self.engine is EngineName.fsdp2 and self.pp == 1 and self.pipeline.virtual > 1:
            raise ValueError(
                f"parallel.pipeline.virtual={self.pipeline.virtual} must be 1 with parallel.engine=fsdp2 and "
                "parallel.pp=1: fully_shard has no parameters that two stages of a rank share"
            )
        if self.rebalance_every and file is None and SCHEDULES[schedule].placement is Route.bidirectional:
            raise ValueError(
                f"parallel.rebalance_every={self.rebalance_every} must be 0 with "
                f"parallel.pipeline.schedule={schedule}: experts of stages that have copies do not move; take dualpipev"
            )
