"""The whole model's weights on one rank: gathered and saved at the end of a run, and loaded into a plain model."""

import shutil
from pathlib import Path

from model.build import allocate, outline
from model.transformer import Transformer
from parallel.doing import doing
from training.determinism import NUMERICS, measure_free_memory
from training.gather import gather_whole, is_cut
from training.save import load, write
from training.setup import Setup
from training.weights import count_parameters, is_whole


@doing("saving weights")
def save_weights(setup: Setup, folder: Path) -> None:
    """The weights of the whole model in the dtype it computes in, in ``folder``; a run that was resumed replaces them.

    Rank 0 writes; collective over all ranks.
    """
    setup.engine.settle()
    plain = outline(setup.config.model, NUMERICS[setup.config.precision].dtype)
    tensors = gather_whole(setup.stages, setup.shards, setup.runner.pipeline, plain, setup.mesh)
    if setup.mesh.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        write(tensors, folder)
    else:
        for _ in tensors:
            pass


def find_whole(setup: Setup, saved: Path) -> Transformer:
    """A plain model with the run's weights: its own where that is one, else one that is loaded from what is ``saved``.

    Raises ValueError where nothing is saved, and where the whole does not fit into memory.
    """
    first = next(iter(setup.stages.values()))
    if is_whole(setup.stages, setup.shards) and not is_cut(next(first.parameters())):
        return first
    if not saved.exists():
        raise ValueError("the model is spread over ranks, and checkpoint.save=false kept no weights to load it from")
    (dtype, recipe), device = NUMERICS[setup.config.precision], setup.mesh.device
    size, free = count_parameters(setup.config.model) * dtype.itemsize, measure_free_memory(device)
    if size > free:
        raise ValueError(f"the whole model takes {size / 1e9:.1f} GB, and rank 0 has {free / 1e9:.1f} GB free")
    whole = allocate(setup.config.model, dtype, device, recipe)
    load(whole, saved)
    return whole
