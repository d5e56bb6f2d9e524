"""The whole configuration, assembled from the rooms' own dataclasses. Loads no torch.

    TrainConfig   what training sees      model, data, optimizer, parallel, precision, checkpoint, run
    RunConfig     what the launcher sees  TrainConfig + cluster
"""

from dataclasses import dataclass, field

from configs.cluster import ClusterConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig
from training.config import CheckpointConfig, DataConfig, OptimizerConfig, Precision, RunSection


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
    init_from: str | None = None  # a folder of weights in Hugging Face format to start from


@dataclass(kw_only=True, slots=True)
class RunConfig(TrainConfig):
    """What the launcher sees."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
