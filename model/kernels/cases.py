"""Every kernel of this folder with a call, in shapes of DeepSeek-V3: what is compiled ahead of time, and timed.

A rank of ep=64 with 4096 tokens: 4 experts of 7168 x 2048, some 32768 choices of 24576 tokens that have come. Work is
what a call has to do at least: each tensor is read or written once.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from model.exchange import Copies
from model.fp8 import DEEPSEEK_V3, FORMATS, MXFP8, Quantised, Scaling
from model.kernels import copies, product, quantisation, router, swiglu
from model.kernels.chips import Unit
from model.kernels.compile import Case
from model.kernels.operators import TILES
from model.kernels.tile import Tile

TOKENS, WIDTH, FFN, EXPERTS, CAME, CHOSEN = 4096, 7168, 2048, 4, 24576, 32768
LINE, BLOCK, MICRO = DEEPSEEK_V3.activations, DEEPSEEK_V3.weights, MXFP8.weights


class Inputs:
    """Tensors without memory, of the dtypes of a chip."""

    def __init__(self, target: str) -> None:
        self.target, self.form = target, FORMATS["gfx942" if target == "hip:gfx942" else "cuda"]

    def wide(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def quantised(self, *shape: int, scaling: Scaling = LINE) -> Quantised:
        """Values, and a scale for each tile."""
        tiles = [triton.cdiv(n, t) for n, t in zip(shape[-2:], scaling.tile, strict=True)]
        scales = self.wide(*shape[:-2], *tiles, dtype=torch.float32)
        return Quantised(self.wide(*shape, dtype=self.form.dtype), scales, scaling.tile)

    def ends(self) -> Tensor:
        """Of the runs of experts, the last at ``CHOSEN``."""
        return self.wide(EXPERTS, dtype=torch.int32)

    def copies(self) -> Copies:
        """``CHOSEN`` choices of ``CAME`` tokens."""
        return Copies(*(self.wide(n, dtype=torch.int64) for n in (CHOSEN, CHOSEN, CAME)))


def list_cases(inputs: Inputs) -> list[Case]:
    """All kernels in all their configurations for the chip of ``inputs``."""
    return [*_quantisations(inputs), *_products(inputs), *_others(inputs)]


def _quantisations(inputs: Inputs) -> Iterator[Case]:
    form, x = inputs.form, inputs.wide(TOKENS, WIDTH)
    weight, rows = inputs.wide(FFN, WIDTH, dtype=torch.float32), inputs.wide(CHOSEN, WIDTH)
    given: dict[str, tuple[Tensor, Scaling]] = {
        "quantise, lines": (x, LINE),
        "quantise, columns": (x.t(), LINE),
        "quantise, blocks": (weight, BLOCK),
        "quantise, micro": (x, MICRO),
    }
    for name, (tensor, scaling) in given.items():
        call = partial(quantisation.quantise, tensor, scaling, form)
        yield Case(name, quantisation._quantise, call, 3 * tensor.numel(), tensor)
    runs: dict[str, Tensor | Quantised] = {"quantise, runs": rows, "requantise, runs": inputs.quantised(CHOSEN, WIDTH)}
    for name, read in runs.items():
        call = partial(quantisation.quantise_runs, read, inputs.ends(), 128, (True, form))
        yield Case(name, quantisation._quantise_runs, call, 4 * rows.numel(), read)


def _products(inputs: Inputs) -> Iterator[Case]:
    cuts, dtype, ends = TILES[inputs.target], torch.bfloat16, inputs.ends()
    a, micro, rows = (
        inputs.quantised(n, WIDTH, scaling=scaling) for n, scaling in ((TOKENS, LINE), (TOKENS, MICRO), (CHOSEN, LINE))
    )
    b, b_micro = inputs.quantised(FFN, WIDTH, scaling=BLOCK), inputs.quantised(FFN, WIDTH, scaling=MICRO)
    experts = inputs.quantised(EXPERTS, FFN, WIDTH, scaling=BLOCK)
    slots = 128 * quantisation.count_tiles(CHOSEN, EXPERTS, 128)
    g, x = inputs.quantised(FFN, slots), inputs.quantised(WIDTH, slots)
    multiply, dense, run = product.multiply_rows, 2 * TOKENS * FFN * WIDTH, 2 * CHOSEN * FFN * WIDTH
    shapes: dict[str, tuple[tuple[Tile, ...], Any, Callable[[Tile], Tensor], float, Any]] = {
        "product": (cuts.blocks, "rows", lambda tile: multiply(a, b, None, dtype, tile), dense, (a, b)),
        "product, micro": (
            tuple(tile._replace(depth=32) for tile in cuts.lines),
            "rows",
            lambda tile: multiply(micro, b_micro, None, dtype, tile),
            dense,
            (micro, b_micro),
        ),
        "rows": (cuts.blocks, "rows", lambda tile: multiply(rows, experts, ends, dtype, tile), run, (rows, experts)),
        "weights": (cuts.lines, "weights", lambda tile: product.multiply_weights(g, x, ends, dtype, tile), run, (g, x)),
    }
    kernels = {"rows": product._multiply_rows, "weights": product._multiply_weights}
    for name, (tiles, kind, call, operations, read) in shapes.items():
        for tile in tiles:
            text = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
            yield Case(name, kernels[kind], partial(call, tile), operations, read, Unit.fp8, text, tile is tiles[0])


def _others(inputs: Inputs) -> Iterator[Case]:
    both, g = inputs.wide(CHOSEN, 2 * FFN), inputs.wide(CHOSEN, FFN, dtype=torch.float32)
    share, inner = inputs.wide(CHOSEN, dtype=torch.float32), inputs.quantised(CHOSEN, 2 * FFN)
    tokens, rows, spread = inputs.wide(CAME, WIDTH), inputs.wide(CHOSEN, WIDTH), inputs.copies()
    kept, (_, slots, starts) = inputs.quantised(CAME, WIDTH), spread
    scores, how = inputs.wide(TOKENS, 256, dtype=torch.float32), (LINE.rounded(), inputs.form)
    n, m = g.numel(), rows.numel()
    calls: dict[str, tuple[Any, Callable[[], Any], float, Any]] = {
        "activate": (swiglu._activate, lambda: swiglu.activate(both, share, LINE, inputs.form), 15 * n, (both, share)),
        "differentiate": (
            swiglu._differentiate,
            lambda: swiglu.differentiate(g, inner, share),
            20 * n,
            (g, inner, share),
        ),
        "enter": (copies._enter, lambda: copies.enter(tokens, spread, how), 3 * tokens.numel(), tokens),
        "copy": (copies._enter, lambda: copies.enter(kept, spread, how)[1], 0, kept),
        "sum copies": (copies._sum_copies, lambda: copies.sum_copies(rows, slots, starts, share), 2 * m, (rows, share)),
        "weigh back": (
            copies._weigh_back,
            lambda: copies.weigh_back(tokens, rows, share, spread),
            3 * m,
            (tokens, rows, share),
        ),
        "choose": (router._choose, lambda: router.choose(scores, 8, 2, 4, 8), 12 * scores.numel(), scores),
    }
    for name, (kernel, call, operations, read) in calls.items():
        yield Case(name, kernel, call, operations, read)
