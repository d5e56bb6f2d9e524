"""Published weights of 8 bits, as DeepSeek-V3's: every projection in E4M3, and beside it its scales.

    model.layers.0.self_attn.o_proj.weight              F8_E4M3 [O, I]
    model.layers.0.self_attn.o_proj.weight_scale_inv    F32 [O / 128, I / 128], rounded up: a factor a block

Reading gives value times scale in float32, which a model rounds to its own dtype. Writing quantises each tensor as it
is published. A folder read into a float32 model and written again is the same to the bit: the largest value of a block
is 448, and 448 s / 448 is s for every scale s that was made as a float32 number over 448.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from model.fp8 import DEEPSEEK_V3, Quantised, dequantise, quantise
from model.shards import Entry, Index, Pending, Shards, read_file

CODE, SUFFIX = "F8_E4M3", "_scale_inv"
PROJECTIONS = ("_proj.weight", ".kv_a_proj_with_mqa.weight")
AS_THEY_ARE = ("eh_proj.weight",)


class QuantisedShards(Shards):
    """``Shards`` whose tensors of 8 bits have scales beside them, and are float32 to whoever reads."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """ValueError for a tensor of 8 bits without scales, or with others than its blocks have."""
        super().__init__(files)
        self._scales: dict[str, Entry] = {}
        for name, entry in list(self.entries.items()):
            if entry.dtype != CODE:
                continue
            scales = self.entries.pop(name + SUFFIX, None)
            if scales is None:
                raise ValueError(f"{entry.file}: {name} is {CODE}, and its scales {name}{SUFFIX} are missing")
            blocks = _count_blocks(entry.shape)
            if scales.shape != blocks or scales.dtype != "F32":
                raise ValueError(
                    f"{scales.file}: {name}{SUFFIX} is {scales.dtype} {list(scales.shape)}; blocks of {name} have F32 "
                    f"{list(blocks)}"
                )
            self._scales[name] = scales

    def dtype(self, name: str) -> torch.dtype:
        """See ``Shards``."""
        return torch.float32 if name in self._scales else super().dtype(name)

    def read(self, name: str, index: Index = ()) -> Tensor:
        """See ``Shards``; a tensor of 8 bits is read as a whole."""
        if name not in self._scales:
            return super().read(name, index)
        values, scales = (read_file(e.file, key) for e, key in
                          ((self.entries[name], name), (self._scales[name], name + SUFFIX)))  # fmt: skip
        return dequantise(Quantised(values, scales, DEEPSEEK_V3.weights.tile))[index]


def quantise_pending(tensors: Mapping[str, Pending]) -> dict[str, Pending]:
    """Tensors to be written, projections among them in 8 bits with their scales behind them."""
    made: dict[str, Pending] = {}
    for name, tensor in tensors.items():
        if not name.endswith(PROJECTIONS) or name.endswith(AS_THEY_ARE):
            made[name] = tensor
            continue
        both = Both(tensor)
        made[name] = Pending(torch.float8_e4m3fn, tensor.shape, both.make_values)
        made[name + SUFFIX] = Pending(torch.float32, _count_blocks(tensor.shape), both.make_scales)
    return made


class Both:
    """A tensor's values and its scales, which are few: they are kept until they are wanted, for it is made once."""

    def __init__(self, tensor: Pending) -> None:
        self._tensor = tensor
        self._scales: Tensor | None = None

    def make_values(self) -> Tensor:
        """In 8 bits."""
        made = quantise(self._tensor.make().float(), DEEPSEEK_V3.weights)
        self._scales = made.scales
        return made.values

    def make_scales(self) -> Tensor:
        """In float32, a factor a block."""
        scales, self._scales = self._scales, None
        return quantise(self._tensor.make().float(), DEEPSEEK_V3.weights).scales if scales is None else scales


def _count_blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.ceil(size / length) for size, length in zip(shape, DEEPSEEK_V3.weights.tile, strict=True))
