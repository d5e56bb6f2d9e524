"""A model's first weights on every rank: drawn, or read from published ones. The last ones: training/whole.py."""

from collections.abc import Mapping
from pathlib import Path

import torch

from configs.schema import TrainConfig
from model.build import allocate
from model.transformer import Transformer
from parallel.build import allocate_sharded, build_sharded
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.determinism import DTYPES


def build_model(config: TrainConfig, mesh: Mesh) -> tuple[Transformer, dict[str, Shard]]:
    """This rank's part of the model with its first weights, drawn from ``run.seed`` or read from ``init_from``."""
    dtype = DTYPES[config.precision]
    if config.init_from is None:
        return build_sharded(config.model, dtype, mesh.device, config.run.seed, mesh)
    from model.huggingface import load as load_published

    model, shards = allocate_sharded(config.model, dtype, mesh.device, mesh)
    if is_whole(shards):
        load_published(model, Path(config.init_from))
        return model, shards
    whole = allocate(config.model, dtype, "cpu")
    load_published(whole, Path(config.init_from))
    theirs = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(theirs[name][shards[name].slices])
        for buffer, other in zip(model.buffers(), whole.buffers(), strict=True):
            buffer.copy_(other)
    return model, shards


def is_whole(shards: Mapping[str, Shard]) -> bool:
    """Whether a rank holds every parameter in full: then its model is the plain one."""
    return all(shard.shape == shard.global_shape for shard in shards.values())


def count_parameters(shards: Mapping[str, Shard]) -> int:
    """Elements of the whole model."""
    return sum(torch.Size(shard.global_shape).numel() for shard in shards.values())
