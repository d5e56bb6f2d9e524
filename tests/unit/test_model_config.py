"""Every rule about a model's sizes answers with the dotted key, the value and the rule."""

from typing import Any

import pytest
from small_models import GROUPED, make_config

from model.config import MTPConfig, Stretch

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"vocab_size": 0}, "model.vocab_size=0 must be positive"),
    ({"num_layers": -1}, "model.num_layers=-1 must be positive"),
    ({"hidden": 0}, "model.hidden=0"),
    ({"ffn": 0}, "model.ffn=0"),
    ({"dense_layers": 4}, "model.dense_layers=4 must lie in 0..model.num_layers=3"),
    ({"dense_layers": -1}, "model.dense_layers=-1"),
    ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
    ({"init_std": -0.1}, "model.init_std=-0.1"),
    *(({"attention": {key: 0}}, f"model.attention.{key}=0") for key in ("heads", "kv_rank", "nope_dim", "v_dim")),
    ({"attention": {"q_rank": 0}}, "model.attention.q_rank=0"),
    ({"attention": {"rope_dim": 5}}, "model.attention.rope_dim=5 must be even"),
    ({"rope": {"theta": 0.0}}, "model.rope.theta=0.0"),
    ({"rope": {"factor": 0.5}}, "model.rope.factor=0.5 must be at least 1"),
    ({"rope": {"beta_fast": 0.5}}, "model.rope.beta_slow=1.0 must be below model.rope.beta_fast=0.5"),
    ({"rope": {"beta_fast": 1.0, "stretch": Stretch.llama3}}, "model.rope.beta_slow=1.0 must be below"),
    ({"attention": {"kv_heads": 2}}, "model.attention.kv_rank=5 and model.attention.kv_heads=2: one must be null"),
    ({"attention": {"kv_rank": None}}, "model.attention.kv_rank=null and model.attention.kv_heads=null: one must"),
    ({"attention": {"qk_norm": True}}, "model.attention.qk_norm=true needs model.attention.kv_heads"),
    ({"attention": {"bias": True}}, "model.attention.bias=true needs model.attention.kv_heads"),
    ({"attention": GROUPED | {"kv_heads": 4}}, "model.attention.kv_heads=4 must divide model.attention.heads=6"),
    ({"attention": GROUPED | {"kv_heads": 0}}, "model.attention.kv_heads=0 must be positive"),
    ({"attention": GROUPED | {"nope_dim": -1}}, "model.attention.nope_dim=-1 must not be negative"),
    ({"attention": GROUPED | {"q_rank": 7}}, "model.attention.q_rank=7 must be null with model.attention.kv_heads=2"),
    ({"moe": {"every": 0}}, "model.moe.every=0 must be positive"),
    ({"moe": {"skip": (3,)}}, "model.moe.skip has 3, which must be a layer, 0..2"),
    ({"rope": {"original_length": 0}}, "model.rope.original_length=0"),
    *(({"moe": {key: 0}}, f"model.moe.{key}=0") for key in ("top_k", "ffn", "groups", "top_groups", "pad")),
    ({"moe": {"experts": -6}}, "model.moe.experts=-6"),
    ({"moe": {"shared_experts": -1}}, "model.moe.shared_experts=-1"),
    ({"moe": {"groups": 4}}, "model.moe.groups=4 must divide model.moe.experts=6"),
    ({"moe": {"top_groups": 4}}, "model.moe.top_groups=4 must not exceed model.moe.groups=3"),
    ({"moe": {"top_k": 5}}, "model.moe.top_k=5 must not exceed the 4 experts in model.moe.top_groups=2"),
    ({"moe": {"aux_alpha": -1.0}}, "model.moe.aux_alpha=-1.0"),
    ({"moe": {"bias_speed": -1.0}}, "model.moe.bias_speed=-1.0"),
    ({"mtp": -1}, "model.mtp.depth=-1"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_sizes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_config(**fields)
    assert str(error.value).startswith(message)


def test_a_negative_weight_of_prediction_is_named() -> None:
    with pytest.raises(ValueError, match=r"^model\.mtp\.weight=-1\.0 must not be negative"):
        MTPConfig(weight=-1.0)


def test_a_model_without_experts_needs_no_expert_sizes() -> None:
    config = make_config(moe={"experts": 0, "ffn": 0, "groups": 1, "top_groups": 1})
    assert [config.is_moe(layer) for layer in range(4)] == [False] * 4
    assert [make_config(mtp=1).is_moe(layer) for layer in range(4)] == [False, True, True, True]


def test_which_layers_route() -> None:
    every_other = make_config(num_layers=5, dense_layers=2, moe={"every": 2}, mtp=1)
    assert every_other.routed_blocks() == [3, 5]
    between = make_config(num_layers=4, dense_layers=0, moe={"skip": (1, 3)})
    assert between.routed_blocks() == [0, 2]
