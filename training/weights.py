"""A model's first weights on every rank: drawn, or read from published ones. The last ones: training/whole.py."""

from pathlib import Path

import torch

from configs.schema import TrainConfig
from model.config import ModelConfig
from model.count import count
from model.huggingface import Source
from parallel.build import Shards, Stages, allocate_stages, build_stages
from parallel.mesh import Mesh
from parallel.pipeline.stages import Pipeline
from training.determinism import NUMERICS
from training.gather import name_tensors
from training.published import take_published


def build_parts(config: TrainConfig, mesh: Mesh, pipeline: Pipeline) -> tuple[Stages, Shards]:
    """This rank's part of the model with its first weights, drawn from ``run.seed`` or read from ``init_from``."""
    numerics, overlap = NUMERICS[config.precision], config.parallel.overlap
    if config.init_from is None:
        return build_stages(config.model, numerics, config.run.seed, mesh, pipeline, overlap)
    stages, shards = allocate_stages(config.model, numerics, mesh, pipeline, overlap)
    take_published(config, stages, shards, Path(config.init_from))
    return stages, shards


def load_parts(config: TrainConfig, mesh: Mesh, pipeline: Pipeline, source: Source) -> Stages:
    """This rank's part of the model with the weights of the whole that ``source`` has."""
    stages, shards = allocate_stages(config.model, NUMERICS[config.precision], mesh, pipeline, config.parallel.overlap)
    fill(stages, shards, source)
    return stages


@torch.no_grad()
def fill(stages: Stages, shards: Shards, source: Source) -> None:
    """Sets what this rank has from the whole model's tensors, of each the part that is here. Experts are in order."""
    for name, tensor in name_tensors(stages.values()).items():
        tensor.copy_(source.read(name, shards[name].slices if name in shards else ()))


def is_whole(stages: Stages, shards: Shards) -> bool:
    """Whether a rank holds every parameter in full: then its one stage is the plain model."""
    plain = all(model.here == range(model.config.num_layers) for model in stages.values())
    return plain and all(shard.shape == shard.global_shape for shard in shards.values())


def count_parameters(config: ModelConfig) -> int:
    """Elements of the whole model."""
    return count(config).trained.total
