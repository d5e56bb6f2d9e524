"""Configuration of training: data, optimizer, precision, checkpoint and the run. Standard library only."""

import re
from dataclasses import dataclass, field
from enum import StrEnum


class Precision(StrEnum):
    """The dtype of parameters and activations; masters are the wider of it and float32.

    fp8, mxfp8: BF16 with most products in FP8 (docs/fp8.md).
    """

    bf16 = "bf16"
    fp8 = "fp8"  # DeepSeek-V3's recipe: tiles of 128, blocks of 128 x 128
    mxfp8 = "mxfp8"  # OCP microscaling: 32 values share a power of two
    fp32 = "fp32"
    fp64 = "fp64"


# Values that share a scale: what tp cuts, it cuts between tiles.
TILES = {Precision.fp8: 128, Precision.mxfp8: 32}


class MomentDtype(StrEnum):
    """The dtype in which AdamW keeps its moments. ``master``: that of the master weights."""

    master = "master"
    bf16 = "bf16"


class RateShape(StrEnum):
    """Learning-rate schedules, each a pure function of the step (training/rates.py)."""

    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"
    deepseek = "deepseek"


class Compile(StrEnum):
    """Whether compute segments go through torch.compile. ``auto``: where it can and pays for its minute."""

    auto = "auto"
    on = "on"
    off = "off"


class Device(StrEnum):
    """Where the model runs. ``auto``: the accelerator torch finds, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    xpu = "xpu"


class Affinity(StrEnum):
    """Whether each rank of a machine keeps to cores of its own. ``auto``: where memory is nearer to some of them."""

    auto = "auto"
    on = "on"
    off = "off"


class Check(StrEnum):
    """How many blocks of a checkpoint are compared with their checksums when it is loaded."""

    full = "full"
    sampled = "sampled"


SHARE = {Check.full: 1, Check.sampled: 8}  # about one in so many


class Resume(StrEnum):
    """What to do where ``run.id`` names a run that is there."""

    never = "never"
    auto = "auto"


class Sink(StrEnum):
    """Where metrics go besides metrics.jsonl."""

    tensorboard = "tensorboard"
    wandb = "wandb"


@dataclass(kw_only=True, slots=True)
class RateConfig:
    """The learning rate over a run: linear warm-up to ``optimizer.lr``, then ``shape``."""

    shape: RateShape = RateShape.cosine
    warmup_steps: int = 0
    stable: float | None = None  # wsd only: share of the run at the full rate, warm-up included
    final: float = 0.1  # the last rate as a share of optimizer.lr (deepseek: the last but one)

    def __post_init__(self) -> None:
        key = "optimizer.rate"
        if self.warmup_steps < 0:
            raise ValueError(f"{key}.warmup_steps={self.warmup_steps} must not be negative")
        if not 0 <= self.final <= 1:
            raise ValueError(f"{key}.final={self.final} must lie in 0..1: it is a share of optimizer.lr")
        if self.shape is RateShape.wsd and (self.stable is None or not 0 <= self.stable < 1):
            raise ValueError(f"{key}.stable={self.stable} must be below 1, at least 0, with {key}.shape=wsd")
        if self.shape is not RateShape.wsd and self.stable is not None:
            raise ValueError(f"{key}.stable={self.stable} must be null with {key}.shape={self.shape}")


@dataclass(kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW over master weights."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ("*norm.weight",)  # name patterns without weight decay
    clip: float = 1.0  # largest gradient norm; 0: never clipped
    moments: MomentDtype = MomentDtype.master
    rate: RateConfig = field(default_factory=RateConfig)
    bucket_bytes: int = 2**25  # gradients that ranks exchange at once; sums do not depend on it
    skip_limit: int = 5  # steps with a non-finite loss or gradient that may follow each other
    ema: float | None = None  # decay a step of the weights' moving average, kept in host memory; null: none

    def __post_init__(self) -> None:
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"optimizer.ema={self.ema} must be at least 0 and below 1, or null")
        for name in ("lr", "eps", "bucket_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be positive")
        for name in ("weight_decay", "clip", "skip_limit"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must not be negative")
        # A bfloat16 moment has 8 significant bits: with beta above 1 - 2^-7 it would never decay.
        limit = 1 - 2**-7 if self.moments is MomentDtype.bf16 else 1.0
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < limit:
                why = " with optimizer.moments=bf16" if self.moments is MomentDtype.bf16 else ""
                raise ValueError(
                    f"optimizer.{name}={getattr(self, name)} must be at least 0 and below {limit:.4g}{why}"
                )


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept of a run."""

    save: bool = True  # write the weights at the end
    every: int = 0  # steps between checkpoints, from which a run can go on; 0: by the clock alone
    minutes: float | None = 10.0  # between checkpoints by the clock; null: by steps alone
    auto: bool = False  # after the first one, minutes are chosen: what loses least, by device_hours and what one costs
    device_hours: float = 50_000.0  # of a device, between failures: Llama 3's 419 in 54 days of 16,384 (2407.21783)
    keep: int = 2  # the newest so many
    keep_every: int = 0  # and for good those of every so many steps; 0: none
    keep_best: int = 0  # and those of the so many best evaluations, each of which makes one
    check: Check = Check.full  # sampled: of what is loaded, about one block in eight is compared with its checksum
    resume: Resume = Resume.never  # auto: a run.id that is taken goes on from its newest good checkpoint
    folder: str | None = None  # a folder, or s3://bucket/prefix, with a folder for each run; null: in the run's own
    near_every: int = 0  # steps between copies on this node and on the next one, used first; 0: none
    near_folder: str = "/dev/shm"  # noqa: S108 (on every node: memory that outlives processes, or a local disk)

    def __post_init__(self) -> None:
        for name in ("every", "keep_every", "keep_best", "near_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must not be negative")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"checkpoint.minutes={self.minutes} must be positive, or null")
        if self.auto and self.minutes is None:
            raise ValueError("checkpoint.minutes=null must be what the first checkpoint waits for with checkpoint.auto")
        if not self.device_hours > 0:
            raise ValueError(f"checkpoint.device_hours={self.device_hours} must be positive")
        if self.keep < 1:
            raise ValueError(f"checkpoint.keep={self.keep} must be at least 1")
        if not self.near_folder.startswith("/"):
            raise ValueError(
                f"checkpoint.near_folder={self.near_folder} must be an absolute path, the same on every node: "
                "take /dev/shm, or a folder on a local disk"
            )
        if self.folder is not None:
            _check_place("checkpoint.folder", self.folder)


def _check_place(key: str, text: str) -> None:
    """A folder, or a URL of one."""
    protocol, url, rest = text.partition("://")
    secret, _, shown = rest.rpartition("@")
    if ":" in secret:
        raise ValueError(
            f"{key}={protocol}://...@{shown} must have no credentials in it, for runs keep what they are started with: "
            "leave them to the environment, as AWS_PROFILE, or to the store's own files"
        )
    if not protocol or (url and not rest.strip("/")) or "::" in text:
        raise ValueError(f"{key}={text} must be a folder, or a URL such as s3://bucket/prefix (null: in the run's own)")


@dataclass(kw_only=True, slots=True)
class ProfileConfig:
    """Which steps a run leaves a trace of (training/profile.py)."""

    steps: str | None = None  # as 3-5 or 4, numbered as a run prints them, from 1; null: none
    memory: bool = True  # what is allocated, too

    def __post_init__(self) -> None:
        self.range()

    def range(self) -> range:
        """The steps, numbered from 0 as the record does."""
        if self.steps is None:
            return range(0)
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.steps, re.ASCII)
        if found is None:
            raise ValueError(f"profile.steps={self.steps} must be a step or a range of them, such as 4 or 3-5")
        first, last = int(found[1]), int(found[2] or found[1])
        if first < 1:
            raise ValueError(f"profile.steps={self.steps} must begin at 1 or later: the first step is step 1")
        if last < first:
            raise ValueError(f"profile.steps={self.steps} must not end before it begins: take {last}-{first}")
        return range(first - 1, last)


@dataclass(kw_only=True, slots=True)
class RampConfig:
    """The batch grows linearly from ``start`` sequences to ``run.global_batch`` over the first ``tokens``."""

    start: int | None = None  # null: no ramp
    tokens: int = 0
    jump: int | None = None  # the batch grows by this many sequences at a time; null: by run.ramp.start

    def __post_init__(self) -> None:
        for name in ("start", "jump"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"run.ramp.{name}={value} must be positive")
        if self.tokens < 0:
            raise ValueError(f"run.ramp.tokens={self.tokens} must not be negative")


@dataclass(kw_only=True, slots=True)
class SamplingConfig:
    """How text is drawn from a model (training/generate.py)."""

    prompt: str = "def "
    tokens: int = 200  # to draw; 0: none
    temperature: float = 0.8  # 0: always the best token
    top_k: int | None = None  # draw from this many best tokens; null: from all
    top_p: float = 1.0  # draw from the fewest best tokens that hold this share of the probability
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or null")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


@dataclass(kw_only=True, slots=True)
class RunSection:
    """One training run."""

    steps: int
    global_batch: int  # sequences a step
    micro_batch: int  # sequences a forward
    name: str
    id: str | None = None  # keys the run's folder; null: name and time
    folder: str = "runs"  # run folders live here
    ramp: RampConfig = field(default_factory=RampConfig)
    seed: int = 0  # of the weights
    threads: int | None = None  # per rank; null: an equal share of the cores
    affinity: Affinity = Affinity.auto  # whether a rank keeps to its share of a machine's cores
    device: Device = Device.auto
    compile: Compile = Compile.auto
    deterministic: bool = True
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    eval_tokens: int = 65536  # held-out tokens an evaluation reads
    sample: SamplingConfig = field(default_factory=SamplingConfig)  # the text at the end of the run
    sinks: tuple[Sink, ...] = ()
    restarts: int = 3  # of ranks that died, from the same checkpoint; without one there is none

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch"):
            if getattr(self, name) <= 0:
                raise ValueError(f"run.{name}={getattr(self, name)} must be positive")
        for name in ("eval_every", "eval_tokens", "seed", "restarts"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name}={getattr(self, name)} must not be negative")
        for name in ("name", "id"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"\w[\w.+=,-]{0,99}", value):
                raise ValueError(
                    f"run.{name}={value} must be fit for a folder's name: at most 100 letters, digits and _ . + = , -, "
                    "with a letter, digit or _ in front"
                )
        if self.threads is not None and self.threads <= 0:
            raise ValueError(f"run.threads={self.threads} must be positive, or null for all cores")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"run.micro_batch={self.micro_batch} must divide run.global_batch={self.global_batch}")
        if self.ramp.start is not None:
            self._check_ramp(self.ramp.start, self.ramp.jump or self.ramp.start)

    def _check_ramp(self, start: int, jump: int) -> None:
        for key, value in (("start", start), ("jump", jump)):
            if value % self.micro_batch:
                raise ValueError(f"run.ramp.{key}={value} must be a multiple of run.micro_batch={self.micro_batch}")
        if start > self.global_batch or (self.global_batch - start) % jump:
            raise ValueError(
                f"run.global_batch={self.global_batch} must be run.ramp.start={start} plus a multiple of "
                f"run.ramp.jump={jump}"
            )
