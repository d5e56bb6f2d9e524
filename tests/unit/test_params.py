"""Counts of parameters and operations, against published sizes, by hand, and against the model itself."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from launcher import params
from launcher.compose import Composer
from launcher.params import describe_cost, lay_out, scale
from model.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig
from model.count import Amount, count, flops_per_token, forward_flops, without_mtp
from model.experts import Experts
from model.huggingface_config import describe
from model.transformer import Transformer

COMPOSER = Composer()


PRESETS = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


def preset(name: str) -> ModelConfig:
    return COMPOSER.compose((f"model={name}",))[0].model


def allocate(config: ModelConfig) -> Transformer:
    """The real model without its memory."""
    with torch.device("meta"):
        return Transformer(config)


BY_HAND = ModelConfig(
    name="by_hand", vocab_size=10, num_layers=3, dense_layers=1, hidden=4, ffn=6,
    attention=AttentionConfig(heads=2, kv_rank=3, nope_dim=2, rope_dim=2, v_dim=5),
    moe=MoEConfig(experts=4, top_k=2, ffn=3, shared_experts=1),
)  # fmt: skip


def test_every_part_by_hand() -> None:
    found = count(BY_HAND)
    # queries 4 * 2 * (2 + 2); latents 4 * (3 + 2); keys and values 3 * 2 * (2 + 5); output 2 * 5 * 4
    attention = 32 + 20 + 42 + 40
    assert found.attention == Amount(3 * attention, 3 * attention, 3 * attention)
    assert found.dense == Amount(72, 72, 72)
    assert found.router == Amount(32, 32, 32)
    assert found.shared == Amount(72, 72, 72)
    assert found.routed == Amount(288, 144, 144)
    assert found.norms == Amount(3 * (8 + 3) + 4, 3 * (8 + 3) + 4, 0)
    assert found.embedding == Amount(40, 40, 0) and found.head == Amount(40, 40, 40)
    assert found.mtp == Amount()
    assert forward_flops(BY_HAND, 100) == 2 * found.main.multiplied + 3 * 2 * (2 + 2 + 5) * 100
    assert flops_per_token(BY_HAND, 100) == 3 * forward_flops(BY_HAND, 100)


SHAPES = {
    "by hand": BY_HAND,
    "dense": ModelConfig(
        name="dense", vocab_size=17, num_layers=2, hidden=8, ffn=12, tied=True,
        attention=AttentionConfig(heads=3, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=6, q_rank=7),
        mtp=MTPConfig(depth=2),
    ),
    "grouped": ModelConfig(
        name="grouped", vocab_size=17, num_layers=4, dense_layers=0, hidden=8, ffn=12,
        attention=AttentionConfig(heads=6, kv_heads=2, nope_dim=2, rope_dim=4, v_dim=5, qk_norm=True, bias=True),
        moe=MoEConfig(experts=6, top_k=3, ffn=5, every=2, skip=(3,)), mtp=MTPConfig(depth=1),
    ),
    "all routed": ModelConfig(
        name="all_routed", vocab_size=17, num_layers=2, dense_layers=0, hidden=8, ffn=12,
        attention=AttentionConfig(heads=3, kv_rank=5, nope_dim=4, rope_dim=2, v_dim=6, q_rank=7),
        moe=MoEConfig(experts=6, top_k=3, ffn=5, shared_experts=2), mtp=MTPConfig(depth=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_count_as_the_model_has_them(name: str) -> None:
    assert count(SHAPES[name]).trained.total == sum(p.numel() for p in allocate(SHAPES[name]).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_as_the_model_has_them(name: str) -> None:
    config = preset(name)
    model = allocate(config)
    found = count(config)
    assert found.trained.total == sum(p.numel() for p in model.parameters())
    parts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("embedding", "head", "mtp")}
    if config.tied:  # counted once
        parts["head"] = 0
    assert (found.embedding.total, found.head.total, found.mtp.total) == tuple(parts.values())
    experts = [module for module in model.layers.modules() if isinstance(module, Experts)]
    routed = sum(p.numel() for module in experts for p in module.parameters())
    assert found.routed.total == routed


def test_deepseek_v3_is_as_large_as_published() -> None:
    config = preset("deepseek_v3")
    found = count(config)
    assert round(found.main.total / 1e9, 2) == 671.03
    assert round(found.main.active / 1e9, 2) == 37.55
    assert round(found.mtp.total / 1e9, 1) == 11.6
    assert found.attention.total / 61 == pytest.approx(187.1e6, rel=1e-3)
    assert found.routed.total / 58 / 256 == pytest.approx(44.04e6, rel=1e-3)
    assert flops_per_token(without_mtp(config), 4096) == pytest.approx(250e9, rel=0.01)
    assert flops_per_token(config, 4096) == pytest.approx(260e9, rel=0.01)


def test_deepseek_v2_lite_is_as_large_as_published() -> None:
    found = count(preset("deepseek_v2_lite"))
    assert round(found.main.total / 1e9, 1) == 15.7
    # The 2.4 B published leave out the embedding, which is looked up.
    assert (found.main.active - found.embedding.active) / 1e9 == pytest.approx(2.4, abs=0.06)


# Billions as published, all and active. Reports round and count differently: what a token of GLM's uses is without
# embedding and head; 1.04 T of Kimi K2 are 1.026 T by its own sizes.
SIZES = {
    "qwen3_30b_a3b": (30.5, 3.3),
    "qwen3_235b_a22b": (235, 22),
    "qwen3_0_6b": (0.6, 0.6),
    "kimi_k2": (1040, 32.6),
    "glm45_air": (106, 12.2),
    "llama3_8b": (8.03, 8.03),
}


@pytest.mark.parametrize("name", SIZES)
def test_families_are_as_large_as_published(name: str) -> None:
    total, active = SIZES[name]
    found = count(preset(name))
    used = found.main.active - (found.embedding.active + found.head.active) * (name == "glm45_air")
    assert found.main.total / 1e9 == pytest.approx(total, rel=0.014)
    assert used / 1e9 == pytest.approx(active, rel=0.017)


def test_qwen_is_as_large_as_published_beside_its_embedding() -> None:
    for name, published in (("qwen3_30b_a3b", 29.9), ("qwen3_235b_a22b", 234), ("qwen3_0_6b", 0.44)):
        found = count(preset(name))
        beside = (found.main.total - found.embedding.total - found.head.total) / 1e9
        assert round(beside, len(str(published).partition(".")[2])) == published


@pytest.mark.parametrize("name", [*SIZES, "deepseek_v2_lite", "deepseek_v3"])
def test_transformers_has_as_many(name: str) -> None:
    """Its model of our configuration, as published, has as many parameters: without MTP, which it leaves out."""
    values = describe(without_mtp(preset(name)), "bfloat16")
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == count(preset(name)).main.total


def test_small_is_the_model_whose_speed_is_measured() -> None:
    assert round(count(preset("small")).main.total / 1e6, 1) == 13.6


def test_tied_head_costs_operations_but_no_parameters() -> None:
    found = count(SHAPES["dense"])
    assert found.head == Amount(0, 0, 17 * 8)
    assert found.mtp.multiplied - found.mtp.active == 2 * (17 * 8 - 3 * 8 - 2 * 8 - 5 - 7)


def test_table_adds_up_and_names_mtp() -> None:
    config = preset("deepseek_v3")
    rows = {name: cells for name, *cells in lay_out(count(config), config.mtp.depth)}
    assert rows["model"][:2] == ["671.03 B", "37.55 B"] and rows["MTP, depth 1"][0] == "11.61 B"
    assert "MTP, depth 0" not in {row[0] for row in lay_out(count(BY_HAND), 0)}


@pytest.mark.parametrize("show", [params._print_rich, params._print_plain])
def test_table_is_readable_in_a_terminal_and_in_a_pipe(
    show: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    config = preset("deepseek_v3")
    show("a model: parameters", lay_out(count(config), config.mtp.depth))
    shown = capsys.readouterr().out
    assert re.search(r"a model: parameters", shown)
    assert re.search(r"part\W+total\W+active\W+multiplied", shown)
    assert re.search(r"model\W+671\.03 B\W+37\.55 B\W+36\.62 B", shown)


def test_costs_are_written_for_a_token_and_for_the_run() -> None:
    lines = describe_cost(COMPOSER.compose(("run=deepseek_v3",))[0])
    assert "training 250.45 GFLOP" in lines[0] and "training 260.64 GFLOP" in lines[1]
    assert lines[2] == "run deepseek_v3: 243261 steps, 14.80 T tokens, 3.86 YFLOP"


def test_scale() -> None:
    assert [scale(n) for n in (999_999, 1_000_000, 671_026_404_352, 2e15)] == [
        "999,999", "1.00 M", "671.03 B", "2,000.00 T",
    ]  # fmt: skip
