"""A transformer block, written once as segments that any runner may order, split or overlap.

    MoE     attention | announce | dispatch | shared | arrive | experts | combine | collect | merge
            compute     comm       comm       compute  comm     compute   comm      comm      compute
    dense   attention | mlp                                           lanes: compute, compute

A segment maps a carry (a tuple) to the next carry. Every exchange has two halves: what starts it returns at once, what
ends it waits, and says so in ``waits``. Between the two a runner may do something else; the shared experts are there
already, between ``dispatch`` and ``arrive``. On one device nothing is sent, and nothing waits.

Tokens may go to their experts in several pieces, so that experts start on the first while the second is on its way:

    .. dispatch | shared | arrive 0 | experts 0 | combine 0 | arrive 1 | experts 1 | combine 1 | collect | merge

Each compute segment is an nn.Module entered through ``__call__``, so that hooks, recomputation and compilation apply to
it. Shapes: x [B, S, H]; T = B * S tokens; K choices; rows [P, H] and R tokens arrived as in model/exchange.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.attention import ATTENTION, Context
from model.config import ModelConfig
from model.core import Core, attend
from model.exchange import Arrived, Exchange, Layout, LocalExchange
from model.experts import Experts, SwiGLU
from model.recompute import runner
from model.router import Router, Routing
from model.segment import Lane, Segment, run


class Attended(NamedTuple):
    """After attention: the residual stream, its normalised copy for the feed-forward part, and the routing if any."""

    residual: Tensor  # [B, S, H]
    normed: Tensor  # [B, S, H]
    routing: Routing | None


class Routed(NamedTuple):
    """Tokens on their way to experts and back, in pieces; ``normed`` is there as long as somebody reads it."""

    residual: Tensor  # [B, S, H]
    normed: Tensor | None  # [B, S, H]
    routing: Routing
    pieces: tuple[Any, ...]  # of each: Shipped, Arrived, Computed, Shipped, at last rows [T / pieces, H]


class Computed(NamedTuple):
    """What the experts made of the tokens that they got."""

    mixed: Tensor  # [R, H]
    layout: Layout


class BlockOutput(NamedTuple):
    """The residual stream after a block, and its routing for the loss and the statistics."""

    x: Tensor  # [B, S, H]
    routing: Routing | None


class AttentionSegment(nn.Module):
    """x + attention(norm(x)), the norm of that, and where its tokens go. Its attention is ``mla`` or ``gqa``."""

    def __init__(self, config: ModelConfig, layer: int, core: Core) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        kind = config.attention.kind
        self.kind = kind.value
        self.add_module(self.kind, ATTENTION[kind](config, layer, core))
        self.mlp_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.router = Router(config) if config.is_moe(layer) else None
        self.run = runner(config)

    def forward(self, x: Tensor, context: Context) -> Attended:
        return self.run(self.body, x, context)

    def body(self, x: Tensor, context: Context) -> Attended:
        """What recomputation repeats."""
        residual = x + getattr(self, self.kind)(self.norm(x), context)
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


class SharedSegment(SwiGLU):
    """Shared experts over the tokens that stayed."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.hidden, config.moe.ffn * config.moe.shared_experts)
        self.run = runner(config)

    def forward(self, residual: Tensor, normed: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        return self.run(self.body, residual, normed, context)

    def body(self, residual: Tensor, normed: Tensor, context: Context) -> Tensor:
        """What recomputation repeats."""
        return residual + super().forward(normed, context.deferred)


class ExpertsSegment(nn.Module):
    """Routed experts over the tokens that arrived, weighed and summed. ``shared`` is a segment by itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.routed = Experts(config.moe.experts, config.hidden, config.moe.ffn)
        self.shared = SharedSegment(config) if config.moe.shared_experts else None
        self.run = runner(config)

    def forward(self, arrived: Arrived, context: Context) -> Computed:
        return self.run(self.body, arrived, context)

    def body(self, arrived: Arrived, context: Context) -> Computed:
        """What recomputation repeats."""
        tokens, gates, layout = arrived
        return Computed(self.routed(tokens, gates, layout, context.deferred), layout)


class MergeSegment(nn.Module):
    """Add what came back from the experts to the residual stream."""

    def forward(self, carry: Routed, context: Context) -> BlockOutput:
        rows = carry.pieces[0] if len(carry.pieces) == 1 else torch.cat(carry.pieces)
        return BlockOutput(carry.residual + rows.view_as(carry.residual), carry.routing)


# What a processor spends its time in: to be compiled, or timed, one by one.
COMPUTE = (AttentionSegment, MLPSegment, SharedSegment, ExpertsSegment, MergeSegment)


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

    def announce(self, carry: Attended, context: Context) -> Routed:
        """Tell ranks how many tokens they will get."""
        assert self.exchange is not None and carry.routing is not None
        announced = self.exchange.announce(carry.routing.experts)
        return Routed(carry.residual, carry.normed, carry.routing, (announced,))

    def dispatch(self, carry: Routed, context: Context) -> Routed:
        """Start to send tokens to their experts' ranks."""
        assert self.exchange is not None and carry.normed is not None
        shipped = self.exchange.dispatch(carry.normed.flatten(0, 1), carry.routing.gates, *carry.pieces)
        return carry._replace(pieces=shipped, normed=carry.normed if self.experts.shared is not None else None)

    def segments(self) -> tuple[Segment, ...]:
        """The block as data, in order."""
        attention = Segment("attention", Lane.compute, self.attention)
        if self.exchange is None:
            return attention, Segment("mlp", Lane.compute, self.mlp)
        shared = self.experts.shared
        there: list[Segment] = []
        back: list[Segment] = []
        for i in range(self.exchange.pieces):
            there += [
                Segment("arrive", Lane.comm, partial(_do, self.exchange.arrive, i), waits=True),
                Segment("experts", Lane.compute, partial(_compute, self.experts, i)),
                Segment("combine", Lane.comm, partial(_do, self.exchange.combine, i)),
            ]
            back.append(Segment("collect", Lane.comm, partial(_do, self.exchange.collect, i), waits=True))
        return (
            attention,
            Segment("announce", Lane.comm, self.announce),
            Segment("dispatch", Lane.comm, self.dispatch),
            *([Segment("shared", Lane.compute, partial(_share, shared))] if shared is not None else []),
            *there,
            *back,
            Segment("merge", Lane.compute, self.merge),
        )

    def forward(self, x: Tensor, context: Context) -> BlockOutput:
        return run(self.segments(), x, context)


def _share(shared: nn.Module, carry: Routed, context: Context) -> Routed:
    """The shared experts, after which nobody reads the normalised stream."""
    return carry._replace(residual=shared(carry.residual, carry.normed, context), normed=None)


def _do(half: Callable[[Any], Any], i: int, carry: Routed, context: Context) -> Routed:
    """One half of an exchange, for piece ``i``."""
    return _put(carry, i, half(carry.pieces[i]))


def _compute(experts: nn.Module, i: int, carry: Routed, context: Context) -> Routed:
    """The experts over piece ``i``."""
    return _put(carry, i, experts(carry.pieces[i], context))


def _put(carry: Routed, i: int, piece: Any) -> Routed:
    return carry._replace(pieces=(*carry.pieces[:i], piece, *carry.pieces[i + 1 :]))
