"""``config.json``: the published ones are read as the presets, and what would change the numbers is refused by key."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from published_configs import PUBLISHED, V2_LITE, V3, YARN
from small_models import GROUPED, SOFTMAX, make_config

from launcher.compose import Composer
from model.config import ModelConfig, RopeConfig
from model.huggingface_config import compare, describe, read_config


def write(folder: Path, values: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_is_the_preset(preset: str, tmp_path: Path) -> None:
    config = Composer().compose((f"model={preset}",))[0].model
    assert compare(config, write(tmp_path, PUBLISHED[preset])).config.mtp.depth == config.mtp.depth
    rope = read_config(tmp_path).rope
    assert (rope.theta, rope.factor == 1) == (config.rope.theta, not PUBLISHED[preset]["rope_scaling"])


@pytest.mark.parametrize("preset", ["deepseek_v3", "deepseek_v2_lite"])
def test_published_stretching_is_read(preset: str, tmp_path: Path) -> None:
    mscale = PUBLISHED[preset]["rope_scaling"]["mscale"]
    assert read_config(write(tmp_path, PUBLISHED[preset])).rope == RopeConfig(
        theta=10000.0, factor=40.0, original_length=4096, mscale=mscale, mscale_all_dim=mscale
    )


# Written in another way: as another model type, without a factor of 1, as it is for a model that is not stretched.
OTHERWISE = {"bos_token_id", "eos_token_id", "architectures", "model_type", "max_position_embeddings", "topk_group"}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_read_then_described(preset: str, tmp_path: Path) -> None:
    config = read_config(write(tmp_path, PUBLISHED[preset]))
    again = describe(config, "bfloat16", eos=1)
    for key, value in again.items():
        if key in PUBLISHED[preset] and key not in OTHERWISE:
            assert value == (PUBLISHED[preset][key] or (0 if key == "num_nextn_predict_layers" else value)), key
    found = read_config(write(tmp_path, again))
    assert replace(found, name="") == replace(config, name="", rope=found.rope)
    assert found.name == {"kimi_k2": "deepseek_v3"}.get(preset, config.name)


@pytest.mark.parametrize("rope", [{}, {"factor": 8.0, "original_length": 128, "mscale": 0.5, "mscale_all_dim": 0.25}])
@pytest.mark.parametrize("moe", [{}, SOFTMAX, {"experts": 0}], ids=["V3", "V2", "dense"])
def test_described_then_read_by_transformers_too(rope: dict[str, Any], moe: dict[str, Any], tmp_path: Path) -> None:
    """Its own spelling of our configuration, newer names included, is read as the same model."""
    config = make_config(rope=rope, moe=moe, attention={"q_rank": None})
    write(tmp_path, describe(config, "bfloat16", eos=5))
    read = compare(config, tmp_path).config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == 5 and str(theirs.dtype) == "torch.bfloat16"
    theirs.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert compare(config, tmp_path).config == read


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"attention_bias": True}, "attention_bias=true is not supported, only false"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported, only 0.0"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act="gelu" is not supported, only "silu"'),
    "frequency": ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported, only 1"),
    "FP8": (
        {"quantization_config": {"fmt": "e4m3"}},
        'quantization_config={"fmt": "e4m3"} is not supported, only {"activation_scheme": "dynamic", ',
    ),
    "score": ({"scoring_func": "softmax"}, 'scoring_func="softmax" is not supported, only "sigmoid"'),
    "method": ({"topk_method": "greedy"}, 'topk_method="greedy" is not supported, only "noaux_tc"'),
    "heads": ({"num_key_value_heads": 8}, "num_key_value_heads=8 is not supported, only 128"),
    "kind": ({"model_type": "gpt2"}, "model_type=gpt2 must be one of deepseek_v2, deepseek_v3, "),
    "no kind": ({"model_type": None}, "model_type=None must be one of deepseek_v2, deepseek_v3, "),
    "absent": ({"hidden_size": None}, "hidden_size is missing"),
    "text": ({"hidden_size": "7168"}, 'hidden_size="7168" must be of type int'),
    "fraction": ({"num_hidden_layers": 3.5}, "num_hidden_layers=3.5 must be of type int"),
    "truth": ({"vocab_size": True}, "vocab_size=true must be of type int"),
    "number": ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be of type bool"),
    "size": ({"topk_group": 9}, "model.moe.top_groups=9 must not exceed model.moe.groups=8"),
    "rope": (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        'rope_scaling.type="linear" is not supported, only yarn or llama3',
    ),
    "no object": ({"rope_scaling": "yarn"}, 'rope_scaling="yarn" must be an object or null'),
    "factor": ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    "YaRN": ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate=false is not supported"),
    "mscale": (
        {"rope_scaling": YARN | {"mscale_all_dim": 1.0}},
        "rope_scaling.mscale=None with rope_scaling.mscale_all_dim",
    ),
    "V2's gates": (V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob=true is not supported, only false"),
    "V2's MTP": (V2_LITE | {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers=1 is not supported, only 0"),
    "V2's pairs": (V2_LITE | {"rope_interleave": False}, "rope_interleave=false is not supported, only true"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_key(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'config.json'))}: {re.escape(message)}"):
        read_config(write(tmp_path, V3 | change))


@pytest.mark.parametrize("text", ["", "{", "[1]", None])
def test_no_configuration(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not a model's configuration: "):
        read_config(tmp_path)


DIFFERENT: dict[str, tuple[ModelConfig, str]] = {
    "size": (make_config(hidden=14), "model.hidden=14 must be 12, hidden_size of "),
    "latent": (make_config(attention={"q_rank": None}), "model.attention.q_rank=null must be 7, q_lora_rank of "),
    "gates": (make_config(moe={"gate_scale": 1.5}), "model.moe.gate_scale=1.5 must be 2.5, routed_scaling_factor of "),
    "theta": (make_config(rope={"theta": 500.0}), "model.rope.theta=500.0 must be 10000.0, rope_theta of "),
    "dense": (make_config(moe={"experts": 0}), "model.moe.experts=0 must be 6, n_routed_experts of "),
    "score": (
        make_config(moe=SOFTMAX | {"normalize_gates": True, "gate_scale": 2.5}),
        "model.moe.score=softmax must be",
    ),
    "kind of attention": (
        make_config(attention=GROUPED),
        "model.attention.heads=6 must be 2, num_attention_heads of ",
    ),
    "heads of keys": (
        make_config(attention=GROUPED | {"heads": 2}),
        "model.attention.kv_rank=null must be 5, kv_lora_rank of ",
    ),
    "layers": (
        make_config(moe={"every": 2}),
        "model.dense_layers=1, moe.every=2 and moe.skip must have layer 2 route its tokens, as ",
    ),
    "MTP": (make_config(mtp=2), "model.mtp.depth=2 must be at most 1, num_nextn_predict_layers of "),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_different_model_is_refused(name: str, tmp_path: Path) -> None:
    config, message = DIFFERENT[name]
    write(tmp_path, describe(make_config(mtp=1), "float32"))
    with pytest.raises(ValueError, match=re.escape(message)):
        compare(config, tmp_path)


def test_what_training_may_change(tmp_path: Path) -> None:
    config = make_config(mtp=1)
    write(tmp_path, describe(config, "float32"))
    for changed in (
        make_config(mtp=0, init_std=0.5, moe={"aux_alpha": 0.5, "bias_speed": 0.0, "pad": 64}),
        replace(config, rope=RopeConfig(factor=4.0, original_length=4096)),
    ):
        compare(changed, tmp_path)


UNPUBLISHABLE: dict[str, tuple[ModelConfig, str]] = {
    "softmax, normalised": (make_config(moe=SOFTMAX | {"normalize_gates": True}), "model.moe.normalize_gates=true"),
    "softmax with MTP": (
        make_config(moe=SOFTMAX, mtp=1),
        "model.mtp.depth=1 cannot be published with model.moe.score=softmax",
    ),
    "MTP without experts": (
        make_config(moe={"experts": 0}, mtp=1),
        "model.mtp.depth=1 cannot be published with model.moe.experts",
    ),
    "groups of one": (
        make_config(moe={"groups": 6}),
        "model.moe.groups=6 cannot be published with model.moe.experts=6",
    ),
    "Qwen with shared experts": (
        make_config(attention=GROUPED | {"qk_norm": True}, moe=SOFTMAX | {"groups": 1, "top_groups": 1}),
        "model.moe.shared_experts=1 cannot be published as qwen3_moe, only 0",
    ),
    "Qwen without norms": (
        make_config(attention=GROUPED, moe=SOFTMAX),
        "model.attention.qk_norm=false cannot be published as qwen3_moe, only true",
    ),
    "Llama, half rotated": (
        make_config(attention=GROUPED | {"nope_dim": 2, "v_dim": 10}, moe={"experts": 0}),
        "model.attention.nope_dim=2 cannot be published as llama, only 0",
    ),
    "Llama, odd": (
        make_config(attention=GROUPED, moe={"experts": 0}, hidden=20),
        "model.hidden=20 cannot be published as llama with model.attention.heads=6",
    ),
    "Qwen2 with norms": (
        make_config(attention=GROUPED | {"bias": True, "qk_norm": True}, moe={"experts": 0}),
        "model.attention.bias=true cannot be published as qwen3, only false",
    ),
    "narrow values": (
        make_config(attention=GROUPED | {"v_dim": 4}, moe={"experts": 0}),
        "model.attention.v_dim=4 cannot be published with model.attention.kv_heads: there it is rope_dim + nope_dim",
    ),
    "GLM in groups of one": (
        make_config(attention=GROUPED, moe={"groups": 6}),
        "model.moe.groups=6 cannot be published with model.moe.experts=6",
    ),
    "mscale": (
        make_config(rope={"factor": 2.0, "mscale_all_dim": 0.0, "mscale": 0.5}),
        "model.rope.mscale=0.5 cannot be",
    ),
}


@pytest.mark.parametrize("name", UNPUBLISHABLE)
def test_what_no_layout_can_express(name: str) -> None:
    config, message = UNPUBLISHABLE[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        describe(config, "float32")
