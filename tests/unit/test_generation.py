"""Generation with a cache of latents: the logits of a full forward, however the tokens come in."""

import pytest
import torch
from small_models import GROUPED, SOFTMAX, YARN, make_batch, make_config, make_model
from torch import Tensor

from model.attention import Cache
from model.transformer import Transformer

CONFIGS = {
    "V3": make_config(),
    "V2": make_config(attention={"q_rank": None}, moe=SOFTMAX),
    "YaRN, with prediction": make_config(rope=YARN, mtp=1),
    "grouped": make_config(attention=GROUPED | {"qk_norm": True}),
    "grouped, biased": make_config(attention=GROUPED | {"bias": True, "nope_dim": 2}, mtp=1),
}


@torch.no_grad()
def generate(model: Transformer, tokens: Tensor, counts: list[int]) -> Tensor:
    """Logits of ``tokens`` given ``counts`` at a time."""
    cache = Cache()
    pieces = []
    for piece in tokens.split(counts, dim=1):
        pieces.append(model.logits(piece, cache))
        assert cache.length == sum(p.shape[1] for p in pieces)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("counts", [[1] * 9, [5, 1, 1, 1, 1], [2, 3, 4], [9]])
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_logits_equal_a_full_forward(name: str, counts: list[int]) -> None:
    model = make_model(CONFIGS[name])
    tokens = make_batch(CONFIGS[name], length=9).ids[:, :9]
    torch.testing.assert_close(generate(model, tokens, counts), model.logits(tokens), atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_cached_logits_are_close_in_bfloat16() -> None:
    # Every expert is chosen: a choice flipped by rounding would drown it.
    config = make_config(moe={"top_k": 6, "groups": 1, "top_groups": 1})
    model = make_model(config, torch.bfloat16)
    tokens = make_batch(config, length=9).ids[:, :9]
    full, cached = model.logits(tokens), generate(model, tokens, [3] + [1] * 6)
    assert full.dtype == cached.dtype == torch.float32
    torch.testing.assert_close(cached, full, atol=0.05 * float(full.std()), rtol=0)


def test_the_cache_holds_latents_only() -> None:
    config = CONFIGS["V3"]
    cache = Cache()
    assert cache.length == 0
    with torch.no_grad():
        make_model(config).logits(make_batch(config, length=9).ids[:, :9], cache)
    a = config.attention
    assert len(cache.layers) == config.num_layers
    for latent, key in cache.layers.values():
        assert latent.shape == (2, 9, a.kv_rank) and key.shape == (2, 9, a.rope_dim)
