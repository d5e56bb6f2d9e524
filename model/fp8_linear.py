"""Linear in FP8: forward, input gradient and weight gradient, by the recipe of model/fp8.py. It keeps its input in FP8.

A weight that is fused of several is quantised part by part, so that the fused one is what its parts would be alone, and
what files hold. Where parts end between blocks, as they mostly do, their products are one.
"""

import math

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from model.fp8 import Quantised, Recipe, Scaling, dequantise
from model.fp8_ops import multiply, quantise
from model.linear import Deferred, Linear, compute_or_defer


class Once:
    """Quantises a tensor once for all who read it in one scaling, and forgets it with the tensor."""

    def __init__(self) -> None:
        self._kept = WeakTensorKeyDictionary()

    def __call__(self, x: Tensor, scaling: Scaling) -> Quantised:
        """x [..., C] -> [T, C], quantised."""
        found = self.find(x, scaling)
        if found is None:
            found = quantise(x.flatten(0, -2), scaling)
            self.keep(x, scaling, found)
        return found

    def find(self, x: Tensor, scaling: Scaling) -> Quantised | None:
        """What has been kept of x."""
        if torch.compiler.is_compiling():  # which finds by itself what is computed twice
            return None
        key, made = self._kept.get(_owner(x), (None, None))
        return made if key == (x._version, scaling, x.shape[-1]) else None

    def keep(self, x: Tensor, scaling: Scaling, made: Quantised) -> None:
        """Until x is changed, quantised otherwise or gone."""
        if not torch.compiler.is_compiling():
            self._kept[_owner(x)] = ((x._version, scaling, x.shape[-1]), made)


def _owner(x: Tensor) -> Tensor:
    """x, or what x is another shape of."""
    base = x._base
    alias = base is not None and base.numel() == x.numel() and base.is_contiguous() and x.is_contiguous()
    return base if base is not None and alias else x


quantise_once = Once()


def list_parts(sizes: tuple[int, ...], recipe: Recipe) -> tuple[int, ...]:
    """Rows of the parts of a fused weight -> rows of what is multiplied at once."""
    lengths = recipe.weights.tile[0], recipe.gradients.tile[1]
    return (sum(sizes),) if not any(size % length for size in sizes for length in lengths) else sizes


class FP8Function(torch.autograd.Function):
    """y = x W^T; ``sizes``: rows of the parts of W. ``deferred`` as in model/linear.py."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, recipe: Recipe, sizes, deferred: Deferred) -> Tensor:  # type: ignore[no-untyped-def]
        rows = quantise_once(x, recipe.activations)
        ctx.save_for_backward(*rows[:2], weight)
        ctx.recipe, ctx.sizes, ctx.shape, ctx.dtype = recipe, sizes, x.shape, x.dtype
        # The parameter itself: see model/linear.py.
        ctx.deferred, ctx.parameter = deferred, None if deferred is None else weight
        parts = weight.flatten(0, -2).split(sizes)
        made = [multiply(rows, quantise(part, recipe.weights), x.dtype) for part in parts]
        return (made[0] if len(made) == 1 else torch.cat(made, 1)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gy: Tensor):  # type: ignore[no-untyped-def]
        values, scales, weight = ctx.saved_tensors
        recipe, needed = ctx.recipe, ctx.needs_input_grad
        parts = gy.flatten(0, -2).split(ctx.sizes, dim=1)
        gx = gw = None
        if needed[0]:
            weights = weight.flatten(0, -2).split(ctx.sizes)
            gx = sum_products(parts, weights, recipe, scales.dtype).to(ctx.dtype).view(ctx.shape)

        def compute() -> Tensor:
            x = dequantise(Quantised(values, scales, recipe.activations.tile))
            rows = quantise(x.t(), recipe.activations)
            made = [multiply(quantise(g.t(), recipe.gradients), rows, weight.dtype) for g in parts]
            return torch.cat(made).view(weight.shape)

        if needed[1]:
            gw = compute_or_defer(compute, ctx.deferred, ctx.parameter)
        return gx, gw, None, None, None


def sum_products(
    gradients: tuple[Tensor, ...], weights: tuple[Tensor, ...], recipe: Recipe, dtype: torch.dtype
) -> Tensor:
    """The sum of g W over parts, g [T, O] and W [O, I] -> [T, I]."""
    products = [
        multiply(quantise(g, recipe.gradients), quantise(weight.t(), recipe.weights), dtype)
        for g, weight in zip(gradients, weights, strict=True)
    ]
    return sum(products[1:], products[0])


class FP8Linear(Linear):
    """``Linear`` with the same parameter, by ``recipe``."""

    joins = False

    def __init__(self, plain: Linear, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.weight, self.sizes, self.recipe = plain.weight, plain.sizes, recipe

    def forward(self, x: Tensor, deferred: Deferred = None) -> Tensor:
        """[..., inputs] -> [..., product of outputs]."""
        *fused, outputs, _ = self.weight.shape
        sizes = list_parts(self.sizes or (outputs,) * math.prod(fused), self.recipe)
        return FP8Function.apply(x, self.weight, self.recipe, sizes, deferred)
