"""Configuration of training: data, optimizer, precision, checkpoint and the run itself. Standard library only."""

from dataclasses import dataclass, field
from enum import StrEnum


class Precision(StrEnum):
    """The dtype of parameters and activations; masters are the wider of it and float32."""

    bf16 = "bf16"
    fp32 = "fp32"
    fp64 = "fp64"


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
    """Whether compute segments go through torch.compile. ``auto``: where a C++ compiler is found and it pays."""

    auto = "auto"
    on = "on"
    off = "off"


class Device(StrEnum):
    """Where the model runs. ``auto``: the accelerator torch finds, else the CPU."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    xpu = "xpu"


class Sink(StrEnum):
    """Where metrics go besides metrics.jsonl."""

    tensorboard = "tensorboard"
    wandb = "wandb"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, its tokens and their packing into sequences."""

    sequence_length: int
    corpus: tuple[str, ...] = ("stdlib",)  # "stdlib": the running Python's own source; else text files or folders
    tokenizer: str = "bytes"  # "bytes", or the path of a Hugging Face tokenizer.json
    folder: str = "data"  # token files live here, one folder per (corpus, tokenizer)
    held_out: float = 0.05  # share of the documents kept for evaluation, chosen by file
    mask_documents: bool = False  # tokens do not attend across document boundaries
    seed: int = 0  # of the shuffle
    workers: int | None = None  # processes that tokenise; null: all cores


@dataclass(kw_only=True, slots=True)
class RateConfig:
    """The learning rate over a run: linear warm-up to ``optimizer.lr``, then ``shape``."""

    shape: RateShape = RateShape.cosine
    warmup_steps: int = 0
    stable: float = 0.0  # wsd, deepseek: share of the steps at the full rate (warm-up included)
    final: float = 0.1  # the last rate as a share of optimizer.lr


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
    skip_limit: int = 5  # steps with a non-finite loss or gradient that may follow each other


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """What is kept of a run."""

    save: bool = True  # write the weights at the end


@dataclass(kw_only=True, slots=True)
class RampConfig:
    """The batch grows linearly from ``start`` sequences to ``run.global_batch`` over the first ``tokens`` tokens."""

    start: int | None = None  # null: no ramp
    tokens: int = 0


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
    threads: int | None = None  # per rank; null: all cores
    device: Device = Device.auto
    compile: Compile = Compile.auto
    deterministic: bool = True
    log_every: int = 1
    eval_every: int = 0  # steps between evaluations; 0: only at the end
    eval_tokens: int = 65536  # held-out tokens an evaluation reads
    sample_tokens: int = 200  # length of the text sample at the end; 0: none
    sample_prompt: str = "def "
    sinks: tuple[Sink, ...] = ()
