"""Routed experts in FP8, from tokens that have come to what they made of them: one operation, so that each tensor is
quantised where it is smallest, and kept in FP8.

    tokens [R, H] -- quantised -- copied to rows -- gate and up -> both [P, 2F]      kept: tokens and both, in FP8
    hidden [P, F] = silu(gate) up, times the choice's gate -- quantised -- down -> rows -- summed over copies -> [R, H]

    g [R, H] -- quantised -- copied to rows -- down' -> g hidden; hidden again from both (DeepSeek-V3, section 3.3.3)
    g both [P, 2F] -- quantised -- gate and up' -> rows -- summed over copies -> g tokens [R, H]

The gate weighs what enters the last product, not what leaves it: rows come out of it ready to be summed, no output is
kept for the gate's gradient, and the gradient that enters is that of a token, the same for all of its copies.
Shapes as in model/exchange.py: R tokens, C choices, P rows, E experts.
"""

import torch
from torch import Tensor, nn

from model.exchange import Copies, Layout, sum_copies
from model.experts import Experts
from model.fp8 import Quantised, Recipe, Scaling
from model.fp8_linear import list_parts, quantise_once
from model.fp8_ops import Operand, activate, differentiate, enter, multiply_rows, multiply_weights, quantise
from model.linear import Deferred, compute_or_defer


class ExpertsFunction(torch.autograd.Function):
    """``tensors``: tokens, gates [C], weights [E, 2, F, H] and [E, H, F], the copies' three, and the ends of runs."""

    @staticmethod
    def forward(ctx, recipe: Recipe, deferred: Deferred, *tensors: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        tokens, gates, gate_up, down, source, slots, starts, ends = tensors
        copies = Copies(source, slots, starts)
        kept, rows = bring(tokens, recipe.activations.rounded(), copies)
        made = [
            multiply_rows(rows, quantise(part, recipe.weights), ends, tokens.dtype) for part in split(gate_up, recipe)
        ]
        share = spread(gates, copies, kept.scales.dtype)
        inner, hidden = activate(made[0] if len(made) == 1 else torch.cat(made, 1), share, recipe.activations)
        out = multiply_rows(hidden, quantise(down, recipe.weights), ends, tokens.dtype)
        ctx.save_for_backward(*kept[:2], *inner[:2], *tensors[1:])
        ctx.recipe, ctx.deferred, ctx.dtype = recipe, deferred, tokens.dtype
        # The parameters themselves: see model/linear.py.
        ctx.parameters = (None, None) if deferred is None else (gate_up, down)
        return sum_copies(out, slots, starts)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        recipe, tile = ctx.recipe, ctx.recipe.activations.tile
        tokens, scales, inner, inner_scales, gates, gate_up, down, source, slots, starts, ends = ctx.saved_tensors
        copies = Copies(source, slots, starts)
        _, rows = bring(g, recipe.gradients.rounded(), copies)
        weighed = multiply_rows(rows, quantise(down.mT, recipe.weights), ends, scales.dtype)
        share = spread(gates, copies, scales.dtype)
        g_both, hidden, g_share = differentiate(weighed, Quantised(inner, inner_scales, tile), share)
        g_gates = g_share.index_select(0, slots).to(gates.dtype)
        parts = split(gate_up, recipe)
        g_parts = g_both.split([part.shape[1] for part in parts], dim=1)
        g_rows = [
            multiply_rows(quantise(g_part, recipe.gradients), quantise(part.mT, recipe.weights), ends, scales.dtype)
            for g_part, part in zip(g_parts, parts, strict=True)
        ]
        g_tokens = sum_copies(sum(g_rows[1:], g_rows[0]).to(ctx.dtype), slots, starts)

        def compute_down() -> Tensor:
            left = Operand(rows, recipe.gradients.rounded())
            return multiply_weights(left, Operand(hidden, recipe.activations), ends, down.dtype)

        def compute_gate_up() -> Tensor:
            rounded = recipe.activations.rounded()
            right = Operand(enter(Quantised(tokens, scales, tile), rounded, copies)[1], rounded)
            made = [multiply_weights(Operand(part, recipe.gradients), right, ends, gate_up.dtype) for part in g_parts]
            return torch.cat(made, 1).view(gate_up.shape)

        g_down = compute_or_defer(compute_down, ctx.deferred, ctx.parameters[1])
        g_gate_up = compute_or_defer(compute_gate_up, ctx.deferred, ctx.parameters[0])
        return None, None, g_tokens, g_gates, g_gate_up, g_down, *(None,) * 4


class FP8Experts(Experts):
    """``Experts`` with the same parameters, by ``recipe``; tokens and their gradients have powers of two as scales."""

    def __init__(self, plain: Experts, recipe: Recipe) -> None:
        nn.Module.__init__(self)
        self.gate_up, self.down, self.recipe = plain.gate_up, plain.down, recipe
        self.wanted = recipe.activations.rounded(), recipe.gradients.rounded()

    def forward(self, tokens: Tensor, gates: Tensor, layout: Layout, deferred: Deferred = None) -> Tensor:
        """See ``Experts``."""
        weights = self.gate_up.weight, self.down.weight
        return ExpertsFunction.apply(self.recipe, deferred, tokens, gates, *weights, *layout.copies, layout.ends)


def bring(tokens: Tensor, scaling: Scaling, copies: Copies) -> tuple[Quantised, Quantised]:
    """tokens [R, H] -> themselves, and their copies among the rows; quantised here unless that has been done."""
    kept, rows = enter(quantise_once.find(tokens, scaling) or tokens, scaling, copies)
    quantise_once.keep(tokens, scaling, kept)
    return kept, rows


def spread(gates: Tensor, copies: Copies, dtype: torch.dtype) -> Tensor:
    """gates [C] -> [P], zero where a row is nobody's."""
    return gates.new_zeros(copies.source.shape[0], dtype=dtype).index_copy_(0, copies.slots, gates.to(dtype))


def split(gate_up: Tensor, recipe: Recipe) -> tuple[Tensor, ...]:
    """[E, 2, F, H] -> what is multiplied at once, each [E, *, H]."""
    return gate_up.flatten(1, 2).split(list_parts((gate_up.shape[2],) * 2, recipe), dim=1)
