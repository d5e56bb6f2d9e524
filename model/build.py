"""Building a model whose weights depend on (seed, name, leading index) and on nothing else.

Every row of a matrix, and every expert of an expert weight, has its own stream: Philox (Salmon et al., SC'11) keyed by
a hash of seed, global name and index, drawn on the CPU in float32. A rank that holds some rows or experts draws just
those, and gets the numbers it would have got on any other layout. Norms start at one, selection biases at zero.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Router
from model.transformer import Transformer

EXPERTS = (".routed.gate_up.weight", ".routed.down.weight")  # one stream an expert; every other matrix has one a row


def _stream(seed: int, name: str, index: int) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def draw(name: str, shape: tuple[int, ...], rows: range, std: float, seed: int) -> Tensor:
    """Rows ``rows`` of the initial value of parameter ``name`` of global ``shape``: [len(rows), *shape[1:]] float32."""
    values = np.empty((len(rows), *shape[1:]), dtype=np.float32)
    for out, index in zip(values, rows, strict=True):
        _stream(seed, name, index).standard_normal(out=out, dtype=np.float32)
    return torch.from_numpy(values).mul_(std)


def split_streams(name: str, weight: Tensor) -> Tensor:
    """``weight`` with one stream per leading index: an expert, or a row counted through the parts of a fused weight."""
    return weight if name.endswith(EXPERTS) else weight.flatten(0, -2)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Write the initial value of every parameter and buffer."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            keyed = split_streams(name, parameter)
            keyed.copy_(draw(name, tuple(keyed.shape), range(len(keyed)), model.config.init_std, seed))
    for buffer in model.buffers():
        buffer.zero_()


def allocate(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """A model without values: parameters in ``dtype``, routers in the wider of it and float32."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype)
    for module in model.modules():
        if isinstance(module, Router):
            module.to(torch.promote_types(dtype, torch.float32))
    return model.to_empty(device=device)


def build(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int) -> Transformer:
    """A model ready to train."""
    model = allocate(config, dtype, device)
    initialise(model, seed)
    return model
