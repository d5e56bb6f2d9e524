"""The grouped product: each expert multiplies its own run of rows.

    rows       | expert 0 ..... | expert 1 .. | expert 2 ....... | unused |
    ends                        e0            e1                 e2

    forward          y[s:e]  = x[s:e] W[i]^T        for each expert i with rows s = ends[i-1] .. e = ends[i]
    input gradient   gx[s:e] = gy[s:e] W[i]
    weight gradient  gW[i]   = gy[s:e]^T x[s:e]

Rows past the last end are padding: they are zero in every result. How the products run is one row per device type in
``PRODUCTS``. Shapes: x [P, I], W [E, O, I] or [E, parts, O/parts, I], ends [E] int32 ascending, y [P, O].
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.linear import Deferred, compute_or_defer
from model.operator import operator, register_fake
from model.product import matmul_into


class RowsProduct(Protocol):
    """x [P, I], w [E, I, O] (any strides), ends [E] -> [P, O]."""

    def __call__(self, x: Tensor, w: Tensor, ends: Tensor) -> Tensor: ...


class WeightsProduct(Protocol):
    """gy [P, O], x [P, I], ends [E] -> [E, O, I]."""

    def __call__(self, gy: Tensor, x: Tensor, ends: Tensor) -> Tensor: ...


def _rows_loop(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    y = x.new_empty(x.shape[0], w.shape[2])
    start = 0
    for weight, end in zip(w, ends.tolist(), strict=True):
        if end > start:
            matmul_into(y[start:end], x[start:end], weight)
        start = end
    y[start:].zero_()
    return y


def _weights_loop(gy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    gw = x.new_empty(len(ends), gy.shape[1], x.shape[1])
    start = 0
    for gradient, end in zip(gw, ends.tolist(), strict=True):
        if end > start:
            matmul_into(gradient, gy[start:end].t(), x[start:end])
        else:
            gradient.zero_()
        start = end
    return gw


def _rows_fused(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    y = torch._grouped_mm(x, w, offs=ends)
    return y.masked_fill_(torch.arange(len(y), device=y.device)[:, None] >= ends[-1], 0)


def _weights_fused(gy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(gy.t(), x, offs=ends)


class Products(NamedTuple):
    """Both products on one device type."""

    rows: RowsProduct
    weights: WeightsProduct


# torch's fused product needs no host copy of `ends`; on a CPU it is no faster than the loop and lacks float64.
PRODUCTS = {"cpu": Products(_rows_loop, _weights_loop), "cuda": Products(_rows_fused, _weights_fused)}


@operator("shoestring::grouped_rows")
def grouped_rows(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    """[P, I] by [E, I, O] -> [P, O], run by run."""
    return PRODUCTS[x.device.type].rows(x, w, ends)


@register_fake(grouped_rows)
def _(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[2])


@operator("shoestring::grouped_weights")
def grouped_weights(gy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """[P, O] and [P, I] -> [E, O, I], run by run."""
    return PRODUCTS[x.device.type].weights(gy, x, ends)


@register_fake(grouped_weights)
def _(gy: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(len(ends), gy.shape[1], x.shape[1])


class GroupedFunction(torch.autograd.Function):
    """The grouped product and its two gradients; ``deferred`` as in model/linear.py."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, ends: Tensor, deferred: Deferred) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, ends)
        ctx.deferred, ctx.parameter = deferred, None if deferred is None else weight
        return grouped_rows(x, weight.flatten(1, -2).transpose(1, 2), ends)

    @staticmethod
    def backward(ctx, gy: Tensor):  # type: ignore[no-untyped-def]
        x, weight, ends = ctx.saved_tensors
        gy = gy.contiguous()
        gx = grouped_rows(gy, weight.flatten(1, -2), ends) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gx, None, None, None

        def compute() -> Tensor:
            return grouped_weights(gy, x, ends).view(weight.shape)

        return gx, compute_or_defer(compute, ctx.deferred, ctx.parameter), None, None


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor, deferred: Deferred = None) -> Tensor:
    """x [P, I], weight [E, ..., I], ends [E] int32 -> [P, product of ...]."""
    return GroupedFunction.apply(x, weight, ends, deferred)
