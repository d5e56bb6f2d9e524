"""How tokens travel to experts, and gradients of what experts made: as they are, or as 8 bits each with their scales.

    plain    x [T, H]                                       2 H bytes a token in BF16
    FP8      values [T, H] | exponents [T, H / 128]         H + H / 128: of a power of two, the exponent is all

What comes back is a sum of several, and travels as it is (DeepSeek-V3, section 3.3.3). A power of two loses nothing
when what has arrived is quantised once more: the experts get the values that were sent.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.fp8 import Quantised, Scaling, dequantise
from model.fp8_linear import quantise_once

Wanted = tuple[Scaling | None, Scaling | None]  # see ``model.experts.Experts``


class Wire(Protocol):
    """There and back."""

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """rows [T, H] -> what is sent of them, each [T, *]."""
        ...

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What has come -> rows [R, H]."""
        ...


class Plain:
    """Rows as they are."""

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.detach(),)

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return parts[0]


class Rounded(NamedTuple):
    """Rows by ``scaling``, whose tiles lie within a row and whose scales are powers of two."""

    scaling: Scaling

    def pack(self, rows: Tensor) -> tuple[Tensor, ...]:
        values, scales, _ = quantise_once(rows, self.scaling)
        return values, scales.to(torch.float8_e8m0fnu)

    def unpack(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        values, exponents = parts
        scales = exponents.to(torch.promote_types(dtype, torch.float32))
        return dequantise(Quantised(values, scales, self.scaling.tile)).to(dtype)


def choose_wire(scaling: Scaling | None) -> Wire:
    """For rows that are wanted by ``scaling``; a scale that several rows share cannot go with each of them."""
    return Rounded(scaling) if scaling is not None and scaling.powers and scaling.tile[0] == 1 else Plain()
