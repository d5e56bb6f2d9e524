"""Rotary tables, their stretching by YaRN, and what rotation promises: scores depend on distances only."""

import math

import pytest
import torch

from model.config import AttentionConfig, RopeConfig
from model.rope import frequencies, rotate, softmax_scale, tables

ATTENTION = AttentionConfig(heads=1, kv_rank=1, nope_dim=48, rope_dim=16, v_dim=1)


def test_plain_frequencies_are_powers_of_theta() -> None:
    expected = torch.tensor([10000.0 ** (-2 * i / 8) for i in range(4)])
    torch.testing.assert_close(frequencies(RopeConfig(), 8), expected)
    cos, sin = tables(RopeConfig(), 8, torch.arange(5))
    assert cos.shape == sin.shape == (5, 4) and cos.dtype == torch.float32
    torch.testing.assert_close(cos[3], (3 * expected).cos())
    torch.testing.assert_close(sin[3], (3 * expected).sin())


def test_tables_start_at_any_position() -> None:
    whole = tables(RopeConfig(), 8, torch.arange(9))
    for part, table in zip(tables(RopeConfig(), 8, torch.arange(6, 9)), whole, strict=True):
        assert torch.equal(part, table[6:])


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones() -> None:
    # DeepSeek-V3's own stretching, 4096 to 163840 positions over 64 dimensions: pairs 0..10 turn more than 32 times
    # in 4096 positions, pairs 23 and up less than once (arXiv 2309.00071, section 3.2).
    rope = RopeConfig(factor=40.0)
    ratio = frequencies(rope, 64) / frequencies(RopeConfig(), 64)
    turns = 4096 * frequencies(RopeConfig(), 64) / (2 * math.pi)
    torch.testing.assert_close(ratio[:11], torch.ones(11))
    torch.testing.assert_close(ratio[23:], torch.full((9,), 1 / 40))
    assert (turns[:11] > 32).all() and (turns[23:] < 1).all()
    assert (ratio[10:24].diff() < 0).all()


def test_yarn_scales_the_softmax_and_the_tables() -> None:
    assert softmax_scale(RopeConfig(), ATTENTION) == 64**-0.5
    stretched = RopeConfig(factor=40.0, mscale=0.5, mscale_all_dim=2.0)
    temperature = 0.1 * 2.0 * math.log(40) + 1
    assert softmax_scale(stretched, ATTENTION) == pytest.approx(64**-0.5 * temperature**2, rel=1e-12)
    cos, _ = tables(stretched, 16, torch.arange(1))
    torch.testing.assert_close(cos, torch.full((1, 8), (0.1 * 0.5 * math.log(40) + 1) / temperature))


def test_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn((2, 1, 1, 8), generator=generator, dtype=torch.float64)
    cos, sin = (t.double() for t in tables(RopeConfig(theta=100.0), 8, torch.arange(40)))

    def score(query: int, key: int) -> torch.Tensor:
        return (rotate(q, cos[[query]], sin[[query]]) * rotate(k, cos[[key]], sin[[key]])).sum()

    torch.testing.assert_close(score(7, 3), score(36, 32), atol=1e-5, rtol=0)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3
    torch.testing.assert_close(score(5, 5), (q * k).sum(), atol=1e-6, rtol=0)


def test_rotation_computes_in_float32_and_returns_the_dtype_it_got() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 3, 5, 8), generator=generator).bfloat16()
    cos, sin = tables(RopeConfig(), 8, torch.arange(5))
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), cos, sin).bfloat16())
