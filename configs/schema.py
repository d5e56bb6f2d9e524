"""The whole configuration, assembled from the rooms' own dataclasses. Loads no torch.

TrainConfig   what training sees      model, data, optimizer, parallel, precision, checkpoint, run, health, ...
RunConfig     what the launcher sees  TrainConfig + cluster, network, preflight, verify, proofs
"""

from dataclasses import dataclass, field

from configs.cluster import ClusterConfig, Scheduler
from configs.network import NetworkConfig
from configs.preflight import PreflightConfig, Verify
from configs.world import check_sizes, fill
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.rules import check_model, check_pipeline, check_tiles
from training.config import TILES, CheckpointConfig, OptimizerConfig, Precision, ProfileConfig, RunSection
from training.data.config import DataConfig
from training.health.config import HealthConfig, TelemetryConfig
from training.support import check as check_engine
from training.support import check_overlap, check_splits

BYTES = 264  # ids of the byte tokenizer: 256 bytes, the end of a document, and what rounds them to 33 * 8


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
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    init_from: str | None = None  # a folder of weights in Hugging Face format to start from

    def __post_init__(self) -> None:
        if self.data.tokenizer == "bytes" and self.model.vocab_size < BYTES:
            raise ValueError(
                f"model.vocab_size={self.model.vocab_size} must be at least {BYTES}, what data.tokenizer=bytes has"
            )
        if self.data.held_out == 1:
            raise ValueError(f"data.held_out={self.data.held_out} must lie between 0 and 1: else all is held out")
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
        check_splits(p, self.run.compile)
        if p.dp is None:  # known once the ranks are: checked again at start
            check_model(self.model, length, p)
        else:
            check_sizes(p, p.dp, self.model, self.run, length)


@dataclass(kw_only=True, slots=True)
class RunConfig(TrainConfig):
    """What the launcher sees."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)
    verify: Verify = Verify.auto  # several ranks start with a passed proof; require: made before, skip: without
    proofs: str | None = None  # the folder of passed proofs, which machines may share; null: in the user's cache

    def __post_init__(self) -> None:
        TrainConfig.__post_init__(self)
        if self.cluster.scheduler is Scheduler.slurm:
            replicas = fill(self.parallel, self.cluster)
            check_sizes(self.parallel, replicas, self.model, self.run, self.data.sequence_length)
