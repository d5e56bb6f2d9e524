"""Linear without bias, as our own autograd Function, so that a weight gradient can be put off.

    forward          y  = x W^T
    input gradient   gx = gy W
    weight gradient  gW = gy^T x        fused with the backward, or collected in ``deferred`` to run later

Pipeline schedules that split the backward (Zero Bubble, arXiv 2401.10241) fill their bubbles with the third product.
Shapes: x [..., I], W [O, I] or [parts, O/parts, I] (fused weights keep their parts apart), y [..., O].
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.product import matmul


class WeightGradient(NamedTuple):
    """A weight gradient not computed yet: whoever runs ``compute`` adds what it returns to ``weight``'s gradient."""

    weight: Tensor
    compute: Callable[[], Tensor]


Deferred = list[WeightGradient] | None


def compute_or_defer(compute: Callable[[], Tensor], deferred: Deferred, parameter: Tensor | None) -> Tensor | None:
    """What ``compute`` returns; with a list in ``deferred``, None: the list gets what ``parameter`` is owed."""
    if deferred is None:
        return compute()
    assert parameter is not None
    deferred.append(WeightGradient(parameter, compute))
    return None


def differentiate_weight(
    gy: Tensor, x: Tensor, weight: Tensor, deferred: Deferred, parameter: Tensor | None
) -> Tensor | None:
    """gy [..., O], x [..., I] -> gW in the shape of ``weight``, now or later."""
    return compute_or_defer(
        lambda: matmul(gy.flatten(0, -2).t(), x.flatten(0, -2)).view(weight.shape), deferred, parameter
    )


class LinearFunction(torch.autograd.Function):
    """y = x W^T. With a list in ``deferred``, the backward appends the weight gradient to it and returns none."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, deferred: Deferred) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        # The parameter itself: what recomputation hands back as saved is a detached alias of it.
        ctx.deferred, ctx.parameter = deferred, None if deferred is None else weight
        return matmul(x, weight.flatten(0, -2).t())

    @staticmethod
    def backward(ctx, gy: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        gx = matmul(gy, weight.flatten(0, -2)) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gx, None, None
        return gx, differentiate_weight(gy, x, weight, ctx.deferred, ctx.parameter), None


class Linear(nn.Module):
    """A weight [outputs, inputs], or [parts, outputs, inputs] for a fused one whose parts a split must respect.

    ``sizes``: outputs of the parts of a fused weight that nothing splits, where they differ.
    """

    joins = True  # y = x W^T is all there is to it: an exchange may have it done block by block

    def __init__(self, inputs: int, *outputs: int, sizes: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight, self.sizes = nn.Parameter(torch.empty(*outputs, inputs)), sizes

    def forward(self, x: Tensor, deferred: Deferred = None) -> Tensor:
        """[..., inputs] -> [..., product of outputs]."""
        return LinearFunction.apply(x, self.weight, deferred)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"
