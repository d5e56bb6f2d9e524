"""A transformer block, written once as segments that any runner may order, split or overlap.

    MoE     attention | dispatch | experts | combine | merge         lanes: compute, comm, compute, comm, compute
    dense   attention | mlp                                           lanes: compute, compute

A segment maps a carry (a tuple of tensors) to the next carry. On one device the two comm segments move nothing. Each
compute segment is an nn.Module entered through ``__call__``, so that hooks, recomputation and compilation apply to it.
Shapes: x [B, S, H]; T = B * S tokens; K choices; rows [P, H] and R tokens arrived as in model/exchange.py.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

from torch import Tensor, nn

from model.attention import Context, LatentAttention
from model.config import ModelConfig
from model.core import Core, attend
from model.exchange import Arrived, Exchange, Layout, LocalExchange, permute, unpermute
from model.experts import Experts, SwiGLU
from model.recompute import runner
from model.router import Router, Routing


class Lane(StrEnum):
    """What a segment occupies: the processor or the network."""

    compute = "compute"
    comm = "comm"


class Segment(NamedTuple):
    """One step of a block: ``module(carry, context)`` gives the next carry."""

    name: str
    lane: Lane
    module: Callable[[Any, Context], Any]


class Attended(NamedTuple):
    """After attention: the residual stream, its normalised copy for the feed-forward part, and the routing if any."""

    residual: Tensor  # [B, S, H]
    normed: Tensor  # [B, S, H]
    routing: Routing | None


class Dispatched(NamedTuple):
    """Tokens where their experts are."""

    attended: Attended
    arrived: Arrived


class Computed(NamedTuple):
    """What the experts made of the tokens that they got; ``residual`` already holds the shared expert's output."""

    residual: Tensor  # [B, S, H]
    mixed: Tensor  # [R, H] where the experts are, [T, H] once combined
    layout: Layout
    routing: Routing


class BlockOutput(NamedTuple):
    """The residual stream after a block, and its routing for the loss and the statistics."""

    x: Tensor  # [B, S, H]
    routing: Routing | None


class AttentionSegment(nn.Module):
    """x + attention(norm(x)), the norm of that, and where its tokens go."""

    def __init__(self, config: ModelConfig, layer: int, core: Core) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mla = LatentAttention(config, layer, core)
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.router = Router(config) if config.is_moe(layer) else None
        self.run = runner(config)

    def forward(self, x: Tensor, context: Context) -> Attended:
        return self.run(self.body, x, context)

    def body(self, x: Tensor, context: Context) -> Attended:
        """What recomputation repeats."""
        residual = x + self.mla(self.norm(x), context)
        normed = self.mlp_norm(residual)
        return Attended(residual, normed, self.router(normed) if self.router is not None else None)


class MLPSegment(nn.Module):
    """The feed-forward part of a dense block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.swiglu = SwiGLU(config.hidden, config.ffn)
        self.run = runner(config)

    def forward(self, carry: Attended, context: Context) -> BlockOutput:
        return self.run(self.body, carry, context)

    def body(self, carry: Attended, context: Context) -> BlockOutput:
        """What recomputation repeats."""
        return BlockOutput(carry.residual + self.swiglu(carry.normed, context.deferred), None)


class ExpertsSegment(nn.Module):
    """Routed experts over the tokens that arrived, weighed and summed; shared experts over the tokens that stayed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.moe
        self.routed = Experts(moe.experts, config.hidden, moe.ffn)
        self.shared = SwiGLU(config.hidden, moe.ffn * moe.shared_experts) if moe.shared_experts else None
        self.run = runner(config)

    def forward(self, carry: Dispatched, context: Context) -> Computed:
        return self.run(self.body, carry, context)

    def body(self, carry: Dispatched, context: Context) -> Computed:
        """What recomputation repeats."""
        (residual, normed, routing), (tokens, gates, layout) = carry
        assert routing is not None
        rows = self.routed(permute(tokens, layout.copies), layout.ends, context.deferred)
        mixed = unpermute(rows, gates, layout.copies)
        if self.shared is not None:
            residual = residual + self.shared(normed, context.deferred)
        return Computed(residual, mixed, layout, routing)


class MergeSegment(nn.Module):
    """Add what came back from the experts to the residual stream."""

    def forward(self, carry: Computed, context: Context) -> BlockOutput:
        return BlockOutput(carry.residual + carry.mixed.view_as(carry.residual), carry.routing)


class Block(nn.Module):
    """Attention and a feed-forward part, dense or routed. ``core`` and ``exchange`` are the seams for parallelism."""

    def __init__(self, config: ModelConfig, layer: int, core: Core = attend, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.attention = AttentionSegment(config, layer, core)
        self.exchange: Exchange | None = None
        if config.is_moe(layer):
            self.exchange = exchange or LocalExchange(config.moe.experts, config.moe.pad)
            self.experts = ExpertsSegment(config)
            self.merge = MergeSegment()
        else:
            self.mlp = MLPSegment(config)

    def dispatch(self, carry: Attended, context: Context) -> Dispatched:
        """Send tokens to their experts' ranks."""
        assert self.exchange is not None and carry.routing is not None
        tokens, (experts, gates, *_) = carry.normed.flatten(0, 1), carry.routing
        return Dispatched(carry, self.exchange.dispatch(tokens, experts, gates))

    def combine(self, carry: Computed, context: Context) -> Computed:
        """Send expert outputs back to their tokens' ranks."""
        assert self.exchange is not None
        return carry._replace(mixed=self.exchange.combine(carry.mixed, carry.layout))

    def segments(self) -> tuple[Segment, ...]:
        """The block as data, in order."""
        attention = Segment("attention", Lane.compute, self.attention)
        if self.exchange is None:
            return attention, Segment("mlp", Lane.compute, self.mlp)
        return (
            attention,
            Segment("dispatch", Lane.comm, self.dispatch),
            Segment("experts", Lane.compute, self.experts),
            Segment("combine", Lane.comm, self.combine),
            Segment("merge", Lane.compute, self.merge),
        )

    def forward(self, x: Tensor, context: Context) -> BlockOutput:
        carry: Any = x
        for segment in self.segments():
            carry = segment.module(carry, context)
        return carry
