"""Which experts a token visits, in one pass: the best groups by their best members, then the best experts within them.

    scores [T, E] --- groups of E / G ---> sums of the ``best`` two [T, G] ---> top groups open ---> top k [T, K]

A program takes some tokens whole, in registers, and takes the largest away k times. Of equal scores the first is
taken, as torch's topk does not promise; NaN counts as the largest, as there. The reference is ``model.router.choose``.
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # tokens of a program


class Rule(NamedTuple):
    """How experts are chosen; ``wide`` experts in ``groups`` groups are what E and G fill up to, powers of two."""

    groups: int
    wide: int
    best: int
    top_groups: int  # 0: all
    top_k: int


class _Size(NamedTuple):
    tokens: int
    experts: int
    groups: int


@triton.jit
def _take(x, numbers, axis: tl.constexpr, past: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest along ``axis``, and the first of ``numbers`` that has it."""
    largest = tl.max(x, axis, keep_dims=True)
    return largest, tl.min(tl.where(x == largest, numbers, past), axis, keep_dims=True)


@triton.jit
def _choose(scores, chosen, size, rule: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    tokens = tl.program_id(0) * rows + tl.arange(0, rows)
    members = size.experts // size.groups
    # Triton 3.7 takes a constant for the end of a static range, and no field of one.
    best: tl.constexpr = rule.best
    top_groups: tl.constexpr = rule.top_groups
    top_k: tl.constexpr = rule.top_k
    group = tl.arange(0, rule.groups)[None, :, None]
    member = tl.arange(0, rule.wide)[None, None, :]
    there = (group < size.groups) & (member < members)
    expert = group * members + member
    line = tokens[:, None, None].to(tl.int64) * size.experts
    x = tl.load(scores + line + expert, mask=there & (tokens < size.tokens)[:, None, None], other=0.0)
    x = tl.where(x == x, x, float("inf"))
    least: tl.constexpr = -3.4028234663852886e38  # what is taken away or closed is -inf, below all that may be chosen
    x = tl.where(there, tl.maximum(x, least), float("-inf"))
    if top_groups > 0:
        rest, total = x, tl.full((rows, rule.groups, 1), 0, x.dtype)
        for _ in tl.static_range(best):
            largest, first = _take(rest, member, 2, rule.wide)
            total += largest
            rest = tl.where(member == first, float("-inf"), rest)
        total = tl.where(group < size.groups, tl.maximum(total, least), float("-inf"))
        closed = tl.full((rows, rule.groups, 1), 1, tl.int32)
        for _ in tl.static_range(top_groups):
            _, first = _take(total, group, 1, rule.groups)
            closed = tl.where(group == first, 0, closed)
            total = tl.where(group == first, float("-inf"), total)
        x = tl.where(closed == 1, float("-inf"), x)
    for k in tl.static_range(top_k):
        largest = tl.max(tl.max(x, 2, keep_dims=True), 1, keep_dims=True)
        first = tl.min(tl.min(tl.where(x == largest, expert, size.experts), 2), 1)
        tl.store(chosen + tokens * top_k + k, first.to(tl.int64), mask=tokens < size.tokens)
        x = tl.where(expert == first[:, None, None], float("-inf"), x)


def choose(scores: Tensor, groups: int, best: int, top_groups: int, top_k: int) -> Tensor:
    """scores [T, E] in ``groups`` equal groups -> [T, K] int64, the best first.

    ``best``: members whose sum ranks a group; ``top_groups`` groups stay open.
    """
    tokens, experts = scores.shape
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=scores.device)
    wide = triton.next_power_of_2(experts // groups), triton.next_power_of_2(groups)
    if tokens:
        size, shape = (
            _Size(tokens, experts, groups),
            Rule(wide[1], wide[0], best, top_groups if groups > top_groups else 0, top_k),
        )
        _choose[(triton.cdiv(tokens, ROWS),)](
            scores.contiguous(), chosen, size, shape, ROWS, num_warps=4, enable_fp_fusion=True
        )
    return chosen
