"""Which tensors of a checkpoint are the weights of a model, and in which dtypes the model has them.

    embedding.weight                  master/embedding.weight                  bfloat16
    layers.3.attention.router.weight  master/layers.3.attention.router.weight  float32
    layers.3.attention.router.bias    buffer/layers.3.attention.router.bias    float32

Shapes are those of the whole model.
"""

from typing import NamedTuple

from torch import Tensor

from model.build import outline
from model.config import ModelConfig
from training.average import KIND
from training.checkpoint.facts import has_average
from training.checkpoint.manifest import DamagedError, Manifest
from training.checkpoint.place import Place
from training.checkpoint.rounded import Rounded
from training.config import Precision
from training.determinism import NUMERICS
from training.gather import name_tensors


class Weight(NamedTuple):
    """A parameter, or a buffer."""

    key: str  # what a checkpoint calls it
    like: Tensor  # of its shape and dtype, without memory


def list_weights(model: ModelConfig, precision: Precision) -> dict[str, Weight]:
    """Those of a model that computes in ``precision``, by name."""
    plain = outline(model, NUMERICS[precision].dtype)
    buffers = {name for name, _ in plain.named_buffers()}
    return {
        name: Weight(f"{'buffer' if name in buffers else 'master'}/{name}", tensor)
        for name, tensor in name_tensors([plain]).items()
    }


def open_weights(folder: Place, manifest: Manifest, model: ModelConfig, average: bool = False) -> Rounded:
    """The weights of the checkpoint in ``folder``, one of ``model``, in the precision that the run had then.

    ``average``: their moving average in their place. Raises ValueError where the checkpoint has none.
    """
    if average and not has_average(manifest):
        raise ValueError(f"ema=true: {folder} has no average of the weights: its run had optimizer.ema=null")
    precision = manifest.run["config"]["precision"]
    if precision not in list(Precision):
        raise DamagedError(f"{folder}: run.config.precision must be one of {', '.join(Precision)}, not {precision}")
    weights = list_weights(model, Precision(precision))
    dtypes = {name: weight.like.dtype for name, weight in weights.items()}
    return Rounded(folder, manifest, dtypes, KIND if average else "master/")
