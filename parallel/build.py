"""A rank's part of a model, with the values that the whole model has there: nothing else is ever in memory."""

import torch

from model.build import initialise, outline
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.parallelize import parallelize
from parallel.placement import Shard
from parallel.plan import plan_transformer


def allocate_sharded(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, mesh: Mesh
) -> tuple[Transformer, dict[str, Shard]]:
    """A model without values, and what part of the whole each of its parameters is."""
    model = outline(config, dtype)
    shards = parallelize(model, plan_transformer(config), mesh)
    return model.to_empty(device=device), shards


def build_sharded(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, seed: int, mesh: Mesh
) -> tuple[Transformer, dict[str, Shard]]:
    """A model ready to train: on every layout the values are those of ``model.build.build`` with the same seed."""
    model, shards = allocate_sharded(config, dtype, device, mesh)
    initialise(model, seed, {name: (shard.global_shape, shard.slices) for name, shard in shards.items()})
    return model, shards
