"""Latent attention: what the core is given, what a token may see, and the parameters with and without q compression."""

from typing import Any

import pytest
import torch
from small_models import make_config
from torch import Tensor

from model.attention import Context, LatentAttention
from model.core import attend
from model.rope import softmax_scale, tables

CONFIGS = {"compressed": make_config(), "direct": make_config(attention={"q_rank": None})}


def make_attention(name: str, **seams: Any) -> LatentAttention:
    attention = LatentAttention(CONFIGS[name], 0, **seams).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return attention


def context(documents: Tensor | None = None) -> Context:
    return Context(*tables(CONFIGS["direct"].rope, 6, torch.arange(7)), documents=documents)


def tokens(seed: int = 0) -> Tensor:
    return torch.randn((2, 7, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_core_gets_scaled_queries_and_heads_that_share_the_rotary_key(name: str) -> None:
    given: list[Tensor] = []

    def record(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        given.extend((q, k, v))
        return attend(q, k, v, documents)

    attention = make_attention(name, core=record)
    out = attention(tokens(), context())
    q, k, v = given
    assert (q.shape, k.shape, v.shape) == ((2, 2, 7, 10), (2, 2, 7, 10), (2, 2, 7, 3))
    assert torch.equal(k[:, 0, :, 4:], k[:, 1, :, 4:]) and not torch.equal(k[:, 0, :, :4], k[:, 1, :, :4])
    config = CONFIGS[name]
    attention.scale *= 2
    attention(tokens(), context())
    torch.testing.assert_close(given[3], 2 * q)
    assert attention.scale == 2 * softmax_scale(config.rope, config.attention)
    assert out.shape == (2, 7, 12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_what_is_before_it_in_its_document(name: str) -> None:
    attention = make_attention(name)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2, dtype=torch.int32)
    for numbers, changed, same in ((None, 4, [0, 1, 2, 3]), (documents, 1, [0, 3, 4, 5, 6])):
        x = tokens()
        before = attention(x, context(numbers))
        x[:, changed] = tokens(1)[:, changed]
        difference = (attention(x, context(numbers)) - before).abs().amax((0, 2))
        assert [t for t in range(7) if difference[t] < 1e-12] == same


def test_the_names_of_the_parameters() -> None:
    shared = ["kv_b.weight", "kv_norm.weight", "o.weight"]
    compressed = {name: tuple(p.shape) for name, p in make_attention("compressed").named_parameters()}
    direct = {name: tuple(p.shape) for name, p in make_attention("direct").named_parameters()}
    assert sorted(compressed) == sorted([*shared, "q_kv_a.weight", "q_b.weight", "q_norm.weight"])
    assert sorted(direct) == sorted([*shared, "q.weight", "kv_a.weight"])
    assert compressed["q_kv_a.weight"] == (7 + 5 + 6, 12) and direct["kv_a.weight"] == (5 + 6, 12)
