"""The keys of ``shoestring eval``."""

from dataclasses import dataclass, field

from parallel.config import ParallelConfig
from training.config import Device, Precision


@dataclass(kw_only=True, slots=True)
class Config:
    """Which weights, on what, and how."""

    folder: str = "runs"  # where runs are looked for by their id
    step: int | None = None  # of a run, the checkpoint after so many; null: the newest, or the weights at its end
    ema: bool = False  # the moving average of the weights (optimizer.ema) in their place
    sets: dict[str, str] = field(default_factory=dict)  # texts by name, as in data.corpus; none: what the run holds out
    tokens: int | None = None  # of each text that are read; null: run.eval_tokens of the run; 0: all
    parallel: ParallelConfig = field(default_factory=ParallelConfig)  # the layout, whatever the run's was
    micro_batch: int | None = None  # sequences a forward; null: the run's
    precision: Precision | None = None  # null: the run's
    device: Device = Device.auto
    threads: int | None = None  # per rank; null: an equal share of the cores
    tasks: tuple[str, ...] = ()  # of lm-eval's harness, instead of texts
    include: str | None = None  # a folder with tasks of your own
    shots: int | None = None  # solved examples before each question; null: as the task says
    limit: int | None = None  # questions of each task; null: all

    def __post_init__(self) -> None:
        for name, least in (("step", 0), ("tokens", 0), ("micro_batch", 1), ("threads", 1), ("shots", 0), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}, or null")
        if self.parallel.engine != "native":
            raise ValueError(f"parallel.engine={self.parallel.engine} must be left out: nothing is optimised here")
        if self.tasks and (self.sets or self.tokens is not None):
            key = "sets" if self.sets else "tokens"
            raise ValueError(
                f"{key} must be left out with tasks=[{','.join(self.tasks)}], which bring texts of their own"
            )
        if self.tasks and self.parallel != ParallelConfig():
            raise ValueError("parallel.* must be left out with tasks: the harness asks a model on one device")
        for name in ("include", "shots", "limit"):
            if getattr(self, name) is not None and not self.tasks:
                raise ValueError(f"{name}={getattr(self, name)} needs tasks: name some, for example tasks=[arc_easy]")
