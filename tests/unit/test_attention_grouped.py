"""Grouped-query attention: what the core is given, what norms and biases do, what is rotated, and what is cached."""

from typing import Any

import pytest
import torch
from small_models import GROUPED, make_config
from torch import Tensor

from model.attention import Cache, Context, GroupedQueryAttention
from model.core import attend
from model.rope import tables

HALF = {"nope_dim": 4, "rope_dim": 4}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normed": {"qk_norm": True},
    "biased, half rotated": {"bias": True, **HALF},
}


def make_attention(kind: str, **seams: Any) -> GroupedQueryAttention:
    attention = GroupedQueryAttention(make_config(attention=GROUPED | KINDS[kind]), 0, **seams).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return attention


def context(attention: GroupedQueryAttention, positions: range = range(7), cache: Cache | None = None) -> Context:
    angles = tables(make_config().rope, attention.sizes.rope_dim, torch.tensor([*positions]))
    return Context(*angles, cache=cache)


def tokens() -> Tensor:
    return torch.randn((2, 7, 12), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def record(given: list[Tensor]) -> Any:
    def core(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        given.extend((q, k, v))
        return attend(q, k, v, documents)

    return core


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_gets_what_each_head_reads(kind: str) -> None:
    """By hand: rows of the weight, a head of keys and values after the other, each with its three of queries."""
    given: list[Tensor] = []
    attention = make_attention(kind, core=record(given))
    attention(tokens(), context(attention))
    q, k, v = given
    assert (q.shape, k.shape, v.shape) == ((2, 6, 7, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    sizes, rows = attention.sizes, attention.qkv.weight.unflatten(1, (5, 8))  # [kv heads, 3 q + k + v, D, H]
    made = torch.einsum("bsh,grdh->bgrsd", tokens(), rows)
    if attention.bias is not None:
        made = made + attention.bias.view(2, 5, 1, 8)
    norms = attention.q_norm, attention.k_norm
    for head in range(6):
        for part, norm, found in ((head % 3, norms[0], q[:, head]), (3, norms[1], k[:, head // 3])):
            wanted = made[:, head // 3, part]
            if norm is not None:
                wanted = wanted / (wanted.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
            wanted = wanted * (sizes.width**-0.5 if part < 3 else 1.0)
            torch.testing.assert_close(found[..., sizes.rope_dim :], wanted[..., sizes.rope_dim :])
            torch.testing.assert_close(found[:, 0], wanted[:, 0])  # at position 0 nothing turns
            turned, pairs = (x[..., : sizes.rope_dim].unflatten(-1, (2, -1)).norm(dim=-2) for x in (found, wanted))
            torch.testing.assert_close(turned, pairs)  # and nowhere does a pair change its length
        torch.testing.assert_close(v[:, head // 3], made[:, head // 3, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_cache_as_without(kind: str) -> None:
    attention, cache = make_attention(kind), Cache()
    whole = attention(tokens(), context(attention))
    for part in (range(0, 3), range(3, 4), range(4, 7)):
        found = attention(tokens()[:, part], context(attention, part, cache))
        torch.testing.assert_close(found, whole[:, part])
    assert [tuple(tensor.shape) for tensor in cache.layers[0]] == [(2, 7, 2, 8)] * 2
