"""A model whose computation is calibrated waiting; exchanges, programs and schedules are real.

    attention | announce dispatch | shared | arrive | experts | combine collect | merge
    asleep      real                asleep   real     asleep    real              at once

A rank that sleeps leaves its processor to others and to whoever moves bytes, so two cores time four ranks as if each
had a machine of its own. Input and weight gradients take as long as a forward each; weight gradients may be put off.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.attention import Context
from model.block import Attended, Block, Computed
from model.exchange import Arrived
from model.linear import Deferred, WeightGradient
from model.router import Routing
from model.transformer import Transformer
from parallel.pipeline.idle import Sleeper

PARTS = 4  # weight gradients of a segment


class Seconds:
    """How long a segment takes, which may be changed between steps."""

    def __init__(self, sleeper: Sleeper) -> None:
        self.value, self._sleeper = 0.0, sleeper

    def rest(self, share: float = 1.0) -> None:
        """Sleeps for a share of it."""
        if self.value:
            self._sleeper.sleep(self.value * share)


class Nap(torch.autograd.Function):
    """Passes a tensor on after a while, there and back; the weight gradients come in ``PARTS`` of as long together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, nap: Callable[[float], None], deferred: Deferred) -> Tensor:
        ctx.nap, ctx.deferred, ctx.weight = nap, deferred, weight
        nap(1.0)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        nap, weight = ctx.nap, ctx.weight
        nap(1.0)

        def compute() -> Tensor:
            nap(1.0 / PARTS)
            return torch.zeros_like(weight)

        if ctx.deferred is not None:
            ctx.deferred.extend([WeightGradient(weight, compute)] * PARTS)
            return g, None, None, None
        nap(1.0)
        return g, torch.zeros_like(weight), None, None


class Asleep(nn.Module):
    """What a segment has instead of weights; it takes a ``share`` of the time at each call."""

    def __init__(self, nap: Seconds, share: float = 1.0) -> None:
        super().__init__()
        self.nap, self.share, self.weight = nap, share, nn.Parameter(torch.zeros(1))

    def rest(self, x: Tensor, deferred: Deferred) -> Tensor:
        """``x``, later."""
        return Nap.apply(x, self.weight, lambda part: self.nap.rest(part * self.share), deferred)


class Attention(Asleep):
    """Sends tokens to experts that are drawn once."""

    def __init__(self, nap: Seconds, experts: Tensor, width: int) -> None:
        super().__init__(nap)
        self.experts, self.load = experts, torch.zeros(width, dtype=torch.int64)
        self.gates = torch.full(experts.shape, 1.0 / experts.shape[1])

    def forward(self, x: Tensor, context: Context) -> Attended:
        """See ``model.block.AttentionSegment``."""
        x = self.rest(x, context.deferred)
        return Attended(x, x, Routing(self.experts, self.gates, torch.zeros(()), self.load))


class Shared(Asleep):
    """Experts of tokens that stay."""

    def forward(self, residual: Tensor, normed: Tensor, context: Context) -> Tensor:
        """See ``model.block.SharedSegment``."""
        return self.rest(residual, context.deferred)


class Experts(Asleep):
    """Experts of tokens that have come."""

    def __init__(self, nap: Seconds, shared: Seconds, share: float) -> None:
        super().__init__(nap, share)
        self.shared = Shared(shared)

    def forward(self, arrived: Arrived, context: Context) -> Computed:
        """See ``model.block.ExpertsSegment``."""
        return Computed(self.rest(arrived.tokens, context.deferred), arrived.layout)


class Naps(NamedTuple):
    """The segments of a block, in seconds."""

    attention: Seconds
    experts: Seconds
    shared: Seconds


def put_to_sleep(model: Transformer, naps: Naps, tokens: int, seed: int, pieces: int = 1) -> None:
    """Replaces what the blocks of ``model`` compute; each sends as many ``tokens`` to experts."""
    moe = model.config.moe
    generator = torch.Generator().manual_seed(seed)
    for block in (module for module in model.modules() if isinstance(module, Block)):
        experts = torch.rand(tokens, moe.experts, generator=generator).topk(moe.top_k).indices
        block.attention = Attention(naps.attention, experts, moe.experts)  # type: ignore[assignment]
        block.experts = Experts(naps.experts, naps.shared, 1 / pieces)  # type: ignore[assignment]
