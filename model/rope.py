"""Rotary positions (RoFormer, arXiv 2104.09864), stretched by YaRN (arXiv 2309.00071) or as Llama 3.1's.

Pair i of R/2 turns by angle position * theta^(-2i/R). The pair is (x[i], x[i + R/2]): weights published with
neighbouring pairs are permuted once, on loading (model/huggingface.py). Tables are float32 whatever the model's dtype,
as published.
"""

import math

import torch
from torch import Tensor

from model.config import AttentionConfig, RopeConfig, Stretch


def _mscale(rope: RopeConfig, weight: float) -> float:
    plain = rope.factor <= 1 or rope.stretch is Stretch.llama3
    return 1.0 if plain else 0.1 * weight * math.log(rope.factor) + 1.0


def frequencies(rope: RopeConfig, dim: int) -> Tensor:
    """Angles per position [dim / 2] float32; stretched, fast ones are kept, slow ones divided by ``factor``."""
    plain = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.factor == 1.0:
        return plain
    if rope.stretch is Stretch.llama3:
        rotations = rope.original_length * plain / (2 * math.pi)
        kept = ((rotations - rope.beta_slow) / (rope.beta_fast - rope.beta_slow)).clamp(0, 1)
        return plain / rope.factor * (1 - kept) + plain * kept

    def pair(rotations: float) -> float:
        # The pair that turns `rotations` times within the original length.
        return dim * math.log(rope.original_length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair(rope.beta_fast)), 0)
    high = min(math.ceil(pair(rope.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    return plain / rope.factor * slow + plain * (1 - slow)


def tables(rope: RopeConfig, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [len(positions), dim / 2] float32, scaled as YaRN asks."""
    angles = positions.float()[:, None] * frequencies(rope, dim).to(positions.device)
    scale = _mscale(rope, rope.mscale) / _mscale(rope, rope.mscale_all_dim)
    return angles.cos() * scale, angles.sin() * scale


def softmax_scale(rope: RopeConfig, attention: AttentionConfig) -> float:
    """The factor on q k^T: 1/sqrt(width of a query), times YaRN's temperature."""
    return attention.width**-0.5 * _mscale(rope, rope.mscale_all_dim) ** 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., S, dim] turned by tables [S, dim / 2]; computed in the wider of float32 and x's dtype."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
