"""A model's weights over ranks: the first ones, and the last ones gathered, saved and loaded into a plain model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from configs.schema import TrainConfig
from model.build import allocate, outline
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.build import allocate_sharded, build_sharded
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.determinism import DTYPES, measure_free_memory
from training.engines import choose_dtype
from training.gather import gather_whole, name_tensors
from training.save import load, write


def build_model(config: TrainConfig, mesh: Mesh) -> tuple[Transformer, dict[str, Shard]]:
    """This rank's part of the model with its first weights, drawn from ``run.seed`` or read from ``init_from``."""
    dtype = choose_dtype(config.parallel.engine, DTYPES[config.precision])
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


def name_dtypes(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer of a plain model in ``dtype``."""
    return {name: tensor.dtype for name, tensor in name_tensors(outline(config, dtype)).items()}


def save_weights(model: Transformer, shards: Mapping[str, Shard], dtype: torch.dtype, mesh: Mesh, folder: Path) -> None:
    """The weights of the whole model in ``dtype``, in ``folder``, which must not exist.

    Rank 0 writes; collective over all ranks.
    """
    tensors = gather_whole(model, shards, name_dtypes(model.config, dtype), mesh)
    if mesh.rank == 0:
        write(tensors, folder)
    else:
        for _ in tensors:
            pass


def find_whole(model: Transformer, shards: Mapping[str, Shard], dtype: torch.dtype, saved: Path) -> Transformer:
    """A plain model in ``dtype``: ``model`` where it is one, else one that is loaded from what is ``saved``.

    Raises ValueError where nothing is saved, and where the whole does not fit into memory.
    """
    weight = next(model.parameters())
    if is_whole(shards) and not isinstance(weight, DTensor):
        return model
    if not saved.exists():
        raise ValueError("the model is spread over ranks, and checkpoint.save=false kept no weights to load it from")
    size, free = count_parameters(shards) * dtype.itemsize, measure_free_memory(weight.device)
    if size > free:
        raise ValueError(f"the whole model takes {size / 1e9:.1f} GB, and rank 0 has {free / 1e9:.1f} GB free")
    whole = allocate(model.config, dtype, weight.device)
    load(whole, saved)
    return whole
