"""The token embedding: a gather, and a gradient that is summed in float32 or wider.

A frequent token's row receives hundreds of contributions in one micro-batch; summed in BF16, most would vanish.
Shapes: ids [...] int64, weight [V, H], result [..., H].
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class EmbeddingFunction(torch.autograd.Function):
    """Rows of a table, and the sum of their gradients."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return weight.index_select(0, ids.flatten()).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        (ids,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=g.device)
        total.index_add_(0, ids.flatten(), g.reshape(-1, ctx.shape[1]).to(wide))
        return None, total.to(ctx.dtype)


def look_up(ids: Tensor, weight: Tensor) -> Tensor:
    """ids [...], weight [V, H] -> [..., H]."""
    return EmbeddingFunction.apply(ids, weight)


Lookup = Callable[[Tensor, Tensor], Tensor]


class Embedding(nn.Module):
    """A table [V, H]. ``lookup`` is the seam behind which it may be split by its rows."""

    def __init__(self, vocab_size: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden))
        self.lookup: Lookup = look_up

    def forward(self, ids: Tensor) -> Tensor:
        """[...] -> [..., H]."""
        return self.lookup(ids, self.weight)
