"""A model's weights over ranks: the first ones, and the last ones gathered, saved and loaded into a plain model."""

from collections.abc import Mapping
from pathlib import Path

import torch

from configs.schema import TrainConfig
from model.build import allocate
from model.transformer import Transformer
from parallel.build import allocate_sharded, build_sharded
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.determinism import DTYPES, measure_free_memory
from training.gather import gather_whole
from training.save import load, write


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


def save_weights(model: Transformer, shards: Mapping[str, Shard], mesh: Mesh, folder: Path) -> None:
    """The whole model's weights, in ``folder``, which must not exist. Rank 0 writes; collective over all ranks."""
    tensors = gather_whole(model, shards, mesh)
    if mesh.rank == 0:
        write(tensors, folder)
    else:
        for _ in tensors:
            pass


def find_whole(model: Transformer, shards: Mapping[str, Shard], saved: Path) -> Transformer:
    """A plain model with the same weights: ``model`` where it is whole, else one that is loaded from what is ``saved``.

    Raises ValueError where nothing is saved, and where the whole does not fit into memory.
    """
    if is_whole(shards):
        return model
    if not saved.exists():
        raise ValueError("the model is spread over ranks, and checkpoint.save=false kept no weights to load it from")
    weight = next(model.parameters())
    size, free = count_parameters(shards) * weight.itemsize, measure_free_memory(weight.device)
    if size > free:
        raise ValueError(f"the whole model takes {size / 1e9:.1f} GB, and rank 0 has {free / 1e9:.1f} GB free")
    whole = allocate(model.config, weight.dtype, weight.device)
    load(whole, saved)
    return whole
