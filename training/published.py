"""Published weights into a rank's part of a model: what it holds is read, and nothing else is."""

from pathlib import Path

import torch

from configs.schema import TrainConfig
from model.build import outline
from model.huggingface import arrange, clear_biases, open_published
from parallel.build import Shards, Stages
from training.chunk import Chunk, copy_into, find_region, intersect
from training.gather import name_tensors


@torch.no_grad()
def take_published(config: TrainConfig, stages: Stages, shards: Shards, folder: Path) -> None:
    """Sets what this rank has from the weights in ``folder``: one published tensor in memory at a time.

    Raises ValueError as ``model.huggingface.load``.
    """
    parts = {}
    for name, tensor in name_tensors(stages.values()).items():
        whole = (tuple(tensor.shape), (0,) * tensor.dim())
        parts[name] = Chunk(name, *(shards[name][:2] if name in shards else whole), tensor)
    shapes = {
        name: tuple(tensor.shape) for name, tensor in name_tensors([outline(config.model, torch.float32)]).items()
    }
    source, pieces = open_published(config.model, shapes, folder)
    for ours, region, published, order, _ in pieces:
        places = find_region(shapes[ours], region)
        offset, shape = tuple(place.start for place in places), tuple(len(place) for place in places)
        if ours in parts and all(intersect(parts[ours], offset, shape)):
            values = arrange(source.read(published), order).view(shape)
            copy_into(parts[ours], [Chunk(ours, shapes[ours], offset, values)])
    for stage in stages.values():
        clear_biases(stage)
