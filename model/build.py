"""Building a model whose weights depend on (seed, name, leading index) and on nothing else.

Every row of a matrix, and every expert of an expert weight, has its own stream: Philox (Salmon et al., SC'11) keyed by
a hash of seed, global name and index, drawn on the CPU in float32. A rank that holds some rows or experts draws just
those, and gets the numbers it would have got on any other layout. Norms start at one, biases at zero.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.fp8 import Recipe
from model.precision import swap
from model.router import Router
from model.transformer import Transformer

EXPERTS = (".routed.gate_up.weight", ".routed.down.weight")  # one stream an expert; every other matrix has one a row
Region = tuple[slice, ...]
Part = tuple[Sequence[int], Region]  # global shape, and the slices that cut the part out of it


def _stream(seed: int, name: str, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw(name: str, shape: Sequence[int], region: Region, std: float, seed: int) -> Tensor:
    """The initial value of ``region`` of parameter ``name`` of global ``shape``: float32, the region's shape."""
    leading = 1 if name.endswith(EXPERTS) else len(shape) - 1
    kept = [range(size)[part] for size, part in zip(shape, region, strict=True)]
    values = np.empty([len(indices) for indices in kept], dtype=np.float32)
    whole = np.empty(shape[leading:], dtype=np.float32)
    for place in np.ndindex(values.shape[:leading]):
        index = 0
        for size, indices, at in zip(shape, kept, place, strict=False):
            index = index * size + indices[at]
        _stream(seed, name, index).standard_normal(out=whole, dtype=np.float32)
        values[place] = whole[region[leading:]]
    return torch.from_numpy(values).mul_(std)


def constant(name: str, tensor: Tensor) -> float | None:
    """What all of a parameter or buffer starts as: norms at one, biases at zero. None: it is drawn."""
    if name.endswith("bias"):
        return 0.0
    return 1.0 if tensor.dim() == 1 else None


@torch.no_grad()
def initialise(model: Transformer, seed: int, parts: Mapping[str, Part] | None = None) -> None:
    """Write the initial value of every parameter and buffer. ``parts``: which part of the whole a parameter is."""
    for name, parameter in model.named_parameters():
        shape, region = (parts or {}).get(name) or (parameter.shape, (slice(None),) * parameter.dim())
        if (start := constant(name, parameter)) is not None:
            parameter.fill_(start)
        else:
            parameter.copy_(draw(name, shape, region, model.config.init_std, seed))
    for buffer in model.buffers():
        buffer.zero_()


def outline(
    config: ModelConfig, dtype: torch.dtype, layers: range | None = None, recipe: Recipe | None = None
) -> Transformer:
    """A model, or the stage with ``layers``, without memory: parameters in ``dtype``, routers at least in float32.

    With a ``recipe`` its products are in FP8.
    """
    with torch.device("meta"):
        model = Transformer(config, layers)
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.to(torch.promote_types(dtype, torch.float32))
    if recipe is not None:
        swap(model, recipe)
    return model


def materialise(model: Transformer, device: torch.device | str) -> Transformer:
    """Gives an outline memory, without values. As ``Module.to_empty``, which loads sympy for ``empty_like``."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, torch.nn.Parameter(data, parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
    return model


def allocate(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, recipe: Recipe | None = None
) -> Transformer:
    """A model without values: see ``outline``."""
    return materialise(outline(config, dtype, recipe=recipe), device)


def build(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int, recipe: Recipe | None = None
) -> Transformer:
    """A model ready to train."""
    model = allocate(config, dtype, device, recipe)
    initialise(model, seed)
    return model
