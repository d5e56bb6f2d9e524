"""SwiGLU (arXiv 2002.05202), as one dense network and as many experts.

    y = down(silu(gate(x)) * up(x)),   gate and up fused in one weight [2, F, H] so that a split stays a split

Shapes: dense x [..., H]; experts tokens [R, H] and rows [P, H] in the layout of model/exchange.py,
weights [E, 2, F, H] and [E, H, F].
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.exchange import Layout, permute, unpermute
from model.fp8 import Scaling
from model.grouped import grouped_matmul
from model.linear import Deferred, Linear
from model.sequence import Sequence, WholeSequence


class SwiGLUFunction(torch.autograd.Function):
    """[..., 2F] -> [..., F]; only the fused input is kept, halves are taken before any conversion."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(g * up, gate), g * F.silu(gate)), dim=-1)


def swiglu(x: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]."""
    return SwiGLUFunction.apply(x)


class SwiGLU(nn.Module):
    """A dense feed-forward network: leading layers and shared experts."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2, ffn)
        self.down = Linear(ffn, hidden)
        self.sequence: Sequence = WholeSequence()

    def forward(self, x: Tensor, deferred: Deferred = None) -> Tensor:
        """[..., H] -> [..., H]."""
        (both,) = self.sequence.gather_linear((x,), (self.gate_up,), deferred)
        return self.sequence.linear_scatter(swiglu(both), self.down, deferred)


class GroupedLinear(nn.Module):
    """One weight per expert: [E, outputs, inputs] or [E, parts, outputs, inputs]."""

    def __init__(self, experts: int, inputs: int, *outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, *outputs, inputs))

    def forward(self, x: Tensor, ends: Tensor, deferred: Deferred = None) -> Tensor:
        """[P, inputs] with runs ending at ``ends`` -> [P, product of outputs]."""
        return grouped_matmul(x, self.weight, ends, deferred)


class Experts(nn.Module):
    """Routed experts. ``wanted``: how they would quantise tokens, and gradients of what they make of them."""

    wanted: tuple[Scaling | None, Scaling | None] = (None, None)

    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate_up = GroupedLinear(experts, hidden, 2, ffn)
        self.down = GroupedLinear(experts, ffn, hidden)

    def forward(self, tokens: Tensor, gates: Tensor, layout: Layout, deferred: Deferred = None) -> Tensor:
        """tokens [R, H], of each the sum of what its experts make of it by ``gates`` [C]: [R, H]."""
        rows = permute(tokens, layout.copies)
        rows = self.down(swiglu(self.gate_up(rows, layout.ends, deferred)), layout.ends, deferred)
        return unpermute(rows, gates, layout.copies)
