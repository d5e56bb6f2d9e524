"""The whole configuration, assembled from the rooms' own dataclasses. Loads no torch.

TrainConfig   what training sees      model, data, optimizer, parallel, precision, checkpoint, run, health, profile
RunConfig     what the launcher sees  TrainConfig + cluster, verify, proofs
"""

from dataclasses import dataclass, field
from enum import StrEnum

from configs.cluster import ClusterConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.pipeline.schedules import SCHEDULES
from parallel.rules import check, check_model, check_pipeline, check_tiles
from parallel.topology import Topology
from training.config import TILES, CheckpointConfig, DataConfig, OptimizerConfig, Precision, ProfileConfig, RunSection
from training.health.config import HealthConfig
from training.ramp import batch_sizes
from training.support import check as check_engine
from training.support import check_compile, check_microbatches, check_overlap

BYTES = 264  # ids of the byte tokenizer: 256 bytes, the end of a document, and what rounds them to 33 * 8


class Verify(StrEnum):
    """What stands before a run of several ranks: a passed proof of its layout, made now where there is none, or not."""

    auto = "auto"
    require = "require"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """What training sees."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: Precision = Precision.bf16
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunSection
    health: HealthConfig = field(default_factory=HealthConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    init_from: str | None = None  # a folder of weights in Hugging Face format to start from

    def __post_init__(self) -> None:
        if self.data.tokenizer == "bytes" and self.model.vocab_size < BYTES:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} must be at least {BYTES}, what data.tokenizer=bytes has"
            )
        if self.profile.range().stop > self.run.steps:
            raise ValueError(
                f"profile.steps={self.profile.steps} must not go beyond the last step: run.steps={self.run.steps}"
            )
        check_engine(self.parallel.engine, self.precision, self.optimizer, self.model.recompute)
        p, length = self.parallel, self.data.sequence_length
        if self.precision in TILES:
            check_tiles(self.model, length, p.tp, TILES[self.precision])
        check_pipeline(self.model, p)
        check_overlap(p, self.run.device)
        if p.pipeline.file is None:
            name = p.schedule
            check_compile(self.run.compile, f"parallel.pipeline.schedule={name}", SCHEDULES[name].splits)
        if p.dp is None:  # known once the ranks are: checked again at start
            check_model(self.model, length, p)
        else:
            topology = Topology(pp=p.pp, dp=p.dp, cp=p.cp, tp=p.tp, ep=p.ep)
            check(self.model, length, batch_sizes(self.run), topology)
            check_microbatches(p, self.run, length, p.dp)


@dataclass(kw_only=True, slots=True)
class RunConfig(TrainConfig):
    """What the launcher sees."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    verify: Verify = Verify.auto  # several ranks start with a passed proof; require: made before, skip: without
    proofs: str | None = None  # the folder of passed proofs, which machines may share; null: in the user's cache
