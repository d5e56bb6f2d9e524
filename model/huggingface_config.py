"""``config.json`` of a published DeepSeek-V2 or V3 and our ModelConfig: one table, read in both directions.

    vocab_size      <->  model.vocab_size           what both have: FIELDS
    hidden_act           must be "silu"             what the model here has no choice in: FIXED
    rope_scaling    <->  model.rope                 YaRN, also under its newer name rope_parameters

What only training sees (initialisation, auxiliary loss, recomputation, padding, MTP's weight) is not compared.
Refused by key: whatever would change the numbers and is not supported. Standard library only.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig, ScoreFunction

FILE = "config.json"


class Field(NamedTuple):
    """A value that both have. Without a default it must be there; ``compared``: a difference changes the model."""

    ours: str
    published: str
    kind: type
    default: Any = ...
    compared: bool = True


FIELDS = (
    Field("vocab_size", "vocab_size", int),
    Field("num_layers", "num_hidden_layers", int),
    Field("hidden", "hidden_size", int),
    Field("ffn", "intermediate_size", int),
    Field("dense_layers", "first_k_dense_replace", int, 0),
    Field("norm_eps", "rms_norm_eps", float, 1e-6),
    Field("init_std", "initializer_range", float, 0.02, compared=False),
    Field("tied", "tie_word_embeddings", bool, False),
    Field("attention.heads", "num_attention_heads", int),
    Field("attention.q_rank", "q_lora_rank", int, None),
    Field("attention.kv_rank", "kv_lora_rank", int),
    Field("attention.nope_dim", "qk_nope_head_dim", int),
    Field("attention.rope_dim", "qk_rope_head_dim", int),
    Field("attention.v_dim", "v_head_dim", int),
    Field("rope.theta", "rope_theta", float, 10000.0),
    Field("moe.experts", "n_routed_experts", int, 0),
    Field("moe.top_k", "num_experts_per_tok", int, 1),
    Field("moe.ffn", "moe_intermediate_size", int, 0),
    Field("moe.shared_experts", "n_shared_experts", int, 0),
    Field("moe.groups", "n_group", int, 1),
    Field("moe.top_groups", "topk_group", int, 1),
    Field("moe.normalize_gates", "norm_topk_prob", bool, True),
    Field("moe.gate_scale", "routed_scaling_factor", float, 1.0),
    Field("moe.aux_alpha", "aux_loss_alpha", float, 1e-4, compared=False),
    Field("mtp.depth", "num_nextn_predict_layers", int, 0, compared=False),
)
YARN = (
    Field("rope.factor", "factor", float, compared=False),
    Field("rope.original_length", "original_max_position_embeddings", int, compared=False),
    Field("rope.beta_fast", "beta_fast", float, 32.0, compared=False),
    Field("rope.beta_slow", "beta_slow", float, 1.0, compared=False),
    Field("rope.mscale", "mscale", float, 1.0, compared=False),
    Field("rope.mscale_all_dim", "mscale_all_dim", float, 0.0, compared=False),
)
# Weights in 8 bits by blocks, as DeepSeek-V3's; V3.1's scales are powers of two, and say so.
QUANTISED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# Keys whose other values change the numbers in ways that the model here does not know.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0, None),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "quantization_config": (None, QUANTISED, QUANTISED | {"scale_fmt": "ue8m0"}),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the two generations."""

    model_type: str
    architecture: str
    score: ScoreFunction
    methods: tuple[str, ...]  # topk_method; the first is the one of a single group


V3 = Kind("deepseek_v3", "DeepseekV3ForCausalLM", ScoreFunction.sigmoid, ("noaux_tc",))
V2 = Kind("deepseek_v2", "DeepseekV2ForCausalLM", ScoreFunction.softmax, ("greedy", "group_limited_greedy"))
KINDS = {kind.model_type: kind for kind in (V3, V2)}


class Published(NamedTuple):
    """A published model's configuration."""

    config: ModelConfig
    interleaved: bool  # rotary pairs are neighbours in its weights


def read_config(folder: Path) -> ModelConfig:
    """The model that ``folder``'s config.json describes. ValueError naming the file, the key and the value."""
    return read_published(folder).config


def read_published(folder: Path) -> Published:
    """``read_config``, and how the weights beside it lie."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a model's configuration: {error}") from error
    try:
        return Published(_parse(values), values.get("rope_interleave") is not False)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def describe(config: ModelConfig, dtype: str, eos: int | None = None) -> dict[str, Any]:
    """The config.json of a model; ``dtype``: "bfloat16"; ``eos``: the token that ends a text.

    ValueError, with our key, for a model that no published layout can express."""
    kind = V2 if config.moe.experts and config.moe.score is ScoreFunction.softmax else V3
    _check_expressible(config, kind)
    values: dict[str, Any] = {"architectures": [kind.architecture], "model_type": kind.model_type}
    values |= {field.published: _get(config, field.ours) for field in FIELDS}
    rope = config.rope
    values |= {
        "num_key_value_heads": config.attention.heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "moe_layer_freq": 1,
        "scoring_func": kind.score.value,
        "topk_method": kind.methods[0 if kind is V3 or config.moe.groups == 1 else 1],
        "rope_interleave": True,
        "max_position_embeddings": int(rope.original_length * rope.factor),
        "rope_scaling": {"type": "yarn"} | {field.published: _get(config, field.ours) for field in YARN},
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos,
    }
    if rope.factor == 1.0:
        values["rope_scaling"] = None
    if config.moe.experts == 0:
        values["first_k_dense_replace"] = config.num_layers
    return values


def compare(config: ModelConfig, folder: Path) -> Published:
    """What is in ``folder``; ValueError, with our key and both values, where a ``config`` to be filled differs from it.

    YaRN may differ, as contexts are stretched in training, and ``config`` may leave MTP modules out."""
    published = read_published(folder)
    routed = config.moe.experts > 0 or published.config.moe.experts > 0
    for field in FIELDS:
        matters = routed or not (field.ours.startswith("moe.") or field.ours == "dense_layers")
        wanted, found = _get(config, field.ours), _get(published.config, field.ours)
        if field.compared and matters and wanted != found:
            raise ValueError(f"model.{field.ours}={wanted} must be {found}, {field.published} of {folder / FILE}")
    if config.moe.experts and config.moe.score is not published.config.moe.score:
        found = published.config.moe.score
        raise ValueError(f"model.moe.score={config.moe.score} must be {found}, that of {folder / FILE}")
    if config.mtp.depth > published.config.mtp.depth:
        raise ValueError(
            f"model.mtp.depth={config.mtp.depth} must be at most {published.config.mtp.depth}, "
            f"num_nextn_predict_layers of {folder / FILE}"
        )
    return published


def _parse(values: dict[str, Any]) -> ModelConfig:
    kind = KINDS.get(str(values.get("model_type")))
    if kind is None:
        raise ValueError(f"model_type={values.get('model_type')} must be one of {', '.join(KINDS)}")
    _check_fixed(values, kind)
    # The newer name holds the base as well, and MTP's key has a newer name too.
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling={json.dumps(scaling)} must be an object or null")
    scaling = dict(scaling)
    values = {"rope_theta": scaling.pop("rope_theta", 10000.0)} | values
    if "num_mtp_layers" in values:
        values = {"num_nextn_predict_layers": values["num_mtp_layers"]} | values
    if kind is V2 and values.get("topk_method", "greedy") == "greedy":
        values = values | {"n_group": 1, "topk_group": 1}
    parsed: dict[str, dict[str, Any]] = {"": {}, "attention": {}, "rope": {}, "moe": {}, "mtp": {}}
    for field in FIELDS:
        section, _, name = field.ours.rpartition(".")
        parsed[section][name] = _read(values, field)
    parsed["rope"] |= _parse_rope(scaling, values)
    if kind is V2:
        parsed["moe"] |= {"bias_speed": 0.0}
    return ModelConfig(
        name=kind.model_type,
        **parsed[""],
        attention=AttentionConfig(**parsed["attention"]),
        rope=RopeConfig(**parsed["rope"]),
        moe=MoEConfig(score=kind.score, **parsed["moe"]),
        mtp=MTPConfig(**parsed["mtp"]),
    )


def _check_fixed(values: dict[str, Any], kind: Kind) -> None:
    rules = FIXED | {"scoring_func": (kind.score.value,), "topk_method": kind.methods}
    rules["num_key_value_heads"] = (values.get("num_attention_heads"), None)
    if kind is V2:
        rules |= {"norm_topk_prob": (False,), "num_nextn_predict_layers": (0, None), "rope_interleave": (True,)}
    for key, allowed in rules.items():
        if key in values and values[key] not in allowed:
            supported = " or ".join(json.dumps(value) for value in allowed if value is not None)
            raise ValueError(
                f"{key}={json.dumps(values[key])} is not supported" + (f", only {supported}" if supported else "")
            )


def _parse_rope(scaling: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind == "default":
        length = Field("rope.original_length", "max_position_embeddings", int, 4096)
        return {"original_length": _read(values, length)}
    if kind != "yarn":
        raise ValueError(f"rope_scaling.type={json.dumps(kind)} is not supported, only yarn")
    for key in sorted(scaling.keys() - {field.published for field in YARN}):
        if scaling[key] is not None:
            raise ValueError(f"rope_scaling.{key}={json.dumps(scaling[key])} is not supported")
    parsed = {field.ours.removeprefix("rope."): _read(scaling, field, "rope_scaling.") for field in YARN}
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    # What a lone one of the two means, the published code and transformers disagree about.
    if not (mscale and all_dim) and (all_dim or mscale not in (None, 1)):
        raise ValueError(
            f"rope_scaling.mscale={mscale} with rope_scaling.mscale_all_dim={all_dim} is not supported: "
            "either both are given, or mscale is 1 and mscale_all_dim is 0"
        )
    return parsed


def _read(values: dict[str, Any], field: Field, prefix: str = "") -> Any:
    value = values.get(field.published)
    if value is None:
        if field.default is ...:
            raise ValueError(f"{prefix}{field.published} is missing")
        return field.default
    if field.kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, field.kind) or (field.kind is int and isinstance(value, bool)):
        raise ValueError(f"{prefix}{field.published}={json.dumps(value)} must be of type {field.kind.__name__}")
    return value


def _get(config: ModelConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _check_expressible(config: ModelConfig, kind: Kind) -> None:
    moe, where = config.moe, "cannot be published"
    if config.mtp.depth and moe.experts == 0:
        raise ValueError(
            f"model.mtp.depth={config.mtp.depth} {where} with model.moe.experts=0: its modules have experts"
        )
    if kind is V2 and moe.normalize_gates:
        raise ValueError(f"model.moe.normalize_gates=true {where} with model.moe.score=softmax")
    if kind is V2 and config.mtp.depth:
        raise ValueError(f"model.mtp.depth={config.mtp.depth} {where} with model.moe.score=softmax")
    if kind is V3 and moe.experts and moe.experts // moe.groups < 2:
        raise ValueError(
            f"model.moe.groups={moe.groups} {where} with model.moe.experts={moe.experts}: a group has at least two"
        )
    rope = config.rope
    if rope.factor > 1 and (not rope.mscale or (not rope.mscale_all_dim and rope.mscale != 1.0)):
        raise ValueError(
            f"model.rope.mscale={rope.mscale} {where} with model.rope.mscale_all_dim={rope.mscale_all_dim}"
        )
