"""Small models of every family that is published: at least six of each, with sizes that divide nothing."""

from typing import Any

from small_models import GROUPED, SOFTMAX, make_config

from model.config import ModelConfig, ScoreFunction, Stretch

YARN = {"factor": 40.0, "original_length": 64, "theta": 1000.0, "mscale": 0.7, "mscale_all_dim": 1.1}
PLAIN_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}
LLAMA3 = {"factor": 8.0, "original_length": 64, "beta_slow": 1.0, "beta_fast": 4.0, "stretch": Stretch.llama3}
SIZES: dict[str, Any] = {"vocab_size": 41, "hidden": 24, "ffn": 36, "init_std": 0.1}
ONE_GROUP = {"groups": 1, "top_groups": 1}
ODD: dict[str, Any] = {"hidden": 21, "ffn": 31, "vocab_size": 37}
ODD_HEADS = {"heads": 9, "kv_heads": 3, "rope_dim": 10, "v_dim": 10}
HALF = {"rope_dim": 4, "nope_dim": 4, "v_dim": 8}  # half of a head is rotated, as in GLM-4.5


def configure(moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A DeepSeek, without an auxiliary loss, which `transformers` does not have."""
    return make_config(moe={"ffn": 14, "aux_alpha": 0.0} | (moe or {}), **{**SIZES, **changes})


def make_v2(moe: dict[str, Any] | None = None, attention: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Its key/value latents are of an even width, which `transformers` takes for granted."""
    return configure(moe=SOFTMAX | (moe or {}), attention={"kv_rank": 6} | (attention or {}), **changes)


def make_glm(attention: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """As GLM-4.5-Air: biases, and no q/k norm."""
    return configure(attention=GROUPED | HALF | {"bias": True} | (attention or {}), **changes)


def make_qwen_moe(
    attention: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    """Softmax over all experts, gates normalised, q/k norm, no shared expert."""
    score = SOFTMAX | ONE_GROUP | {"normalize_gates": True, "shared_experts": 0, "gate_scale": 1.0}
    attention = GROUPED | {"qk_norm": True} | (attention or {})
    return configure(**{"dense_layers": 0, **changes}, attention=attention, moe=score | (moe or {}))


def make_dense(attention: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """A Llama."""
    return configure(attention=GROUPED | (attention or {}), moe={"experts": 0}, **changes)


ONE_HEAD, EVERY_HEAD = {"kv_heads": 1}, {"kv_heads": 6}
CONFIGS: dict[str, dict[str, ModelConfig]] = {
    "deepseek_v3": {
        "as published": configure(),
        "odd sizes": configure(
            attention={"heads": 3, "q_rank": 11, "kv_rank": 7, "nope_dim": 5, "rope_dim": 6, "v_dim": 9},
            moe={"experts": 15, "groups": 5, "top_groups": 3, "top_k": 4, "ffn": 9, "shared_experts": 3},
            **ODD,
        ),
        "no query compression": configure(attention={"q_rank": None}),
        "one group, as Kimi K2": configure(moe={"groups": 1, "top_groups": 1, "top_k": 3}),
        "YaRN": configure(rope=YARN),
        "no shared expert": configure(moe={"shared_experts": 0}),
        "gates not normalised": configure(moe={"normalize_gates": False}),
        "several dense layers": configure(num_layers=4, dense_layers=2),
        "tied": configure(tied=True),
        "all dense": configure(dense_layers=3),
        "no experts": configure(moe={"experts": 0}),
        "top 1": configure(moe={"top_k": 1, "normalize_gates": False}),  # normalised, its router has no gradient
    },
    "deepseek_v2": {
        "greedy": make_v2(ONE_GROUP, attention={"q_rank": None}),
        "group-limited": make_v2({"gate_scale": 4.0}, rope=YARN),
        "no shared expert": make_v2({"shared_experts": 0}),
        "several dense layers": make_v2(ONE_GROUP, num_layers=4, dense_layers=2),
        "tied": make_v2(tied=True),
        "top 1": make_v2(ONE_GROUP | {"top_k": 1}),
    },
    "glm4_moe": {
        "Air": make_glm(),
        "large": make_glm({"qk_norm": True}),
        "no biases, one head": make_glm({"bias": False, **ONE_HEAD}),
        "one group": make_glm(moe={"groups": 1, "top_groups": 1, "top_k": 3}),
        "several dense layers, tied": make_glm(num_layers=4, dense_layers=2, tied=True),
        "every head, no shared expert": make_glm(EVERY_HEAD, moe={"shared_experts": 0}),
        "YaRN": make_glm(rope=PLAIN_YARN),
    },
    "qwen3_moe": {
        "as published": make_qwen_moe(),
        "gates not normalised": make_qwen_moe(moe={"normalize_gates": False}),
        "every other layer": make_qwen_moe(moe={"every": 2}, num_layers=4),
        "dense layers between": make_qwen_moe(moe={"skip": (0, 2)}, num_layers=4),
        "odd sizes": make_qwen_moe(ODD_HEADS, {"experts": 7, "top_k": 3, "ffn": 9}, **ODD),
        "YaRN, tied": make_qwen_moe(rope=PLAIN_YARN, tied=True),
        "one head": make_qwen_moe(ONE_HEAD),
        "every head, top 1": make_qwen_moe(EVERY_HEAD, {"top_k": 1, "normalize_gates": False}),
    },
    "qwen3": {
        "as published": make_dense({"qk_norm": True}),
        "tied": make_dense({"qk_norm": True}, tied=True),
        "one head": make_dense({"qk_norm": True, **ONE_HEAD}),
        "every head": make_dense({"qk_norm": True, **EVERY_HEAD}),
        "odd sizes": make_dense({"qk_norm": True, **ODD_HEADS}, **ODD),
        "YaRN": make_dense({"qk_norm": True}, rope=PLAIN_YARN),
    },
    "qwen2": {
        "as published": make_dense({"bias": True}),
        "tied": make_dense({"bias": True}, tied=True),
        "one head": make_dense({"bias": True, **ONE_HEAD}),
        "every head": make_dense({"bias": True, **EVERY_HEAD}, norm_eps=1e-5),
        "odd sizes": make_dense({"bias": True, "heads": 3, "kv_heads": 3, "rope_dim": 8, "v_dim": 8}),
        "YaRN": make_dense({"bias": True}, rope=PLAIN_YARN),
    },
    "llama": {
        "as published": make_dense(),
        "Llama 3.1": make_dense(rope=LLAMA3),
        "tied, stretched": make_dense(rope=LLAMA3, tied=True),
        "one head": make_dense(ONE_HEAD),
        "every head": make_dense(EVERY_HEAD),
        "odd sizes": make_dense(ODD_HEADS, **ODD | {"hidden": 27}),
        "YaRN": make_dense(rope=PLAIN_YARN),
    },
}
NAMED = {f"{family}: {name}": config for family, configs in CONFIGS.items() for name, config in configs.items()}


def is_softmax(config: ModelConfig) -> bool:
    """Whether its routers have no selection bias where it is published."""
    return config.moe.score is ScoreFunction.softmax
