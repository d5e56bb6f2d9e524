"""``config.json`` of a published model and our ModelConfig, by its family's row of model/families/table.py.

    vocab_size      <->  model.vocab_size           what both have: the family's fields
    hidden_act           must be "silu"             what the model here has no choice in: its ``fixed``
    rope_scaling    <->  model.rope                 YaRN or Llama 3's, also under its newer name rope_parameters

What only training sees (initialisation, auxiliary loss, recomputation, padding, MTP's weight) is not compared.
Refused by key: whatever would change the numbers and is not supported. Standard library only.
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from model.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig, Stretch
from model.families.family import Family, Field, Values, get, say
from model.families.table import BY_TYPE, find

FILE = "config.json"
LENGTH = Field("rope.original_length", "original_max_position_embeddings", int)
FACTOR = Field("rope.factor", "factor", float)
STRETCHES: dict[Stretch, tuple[Field, ...]] = {
    Stretch.yarn: (
        FACTOR,
        LENGTH,
        Field("rope.beta_fast", "beta_fast", float, 32.0),
        Field("rope.beta_slow", "beta_slow", float, 1.0),
        Field("rope.mscale", "mscale", float, 1.0),
        Field("rope.mscale_all_dim", "mscale_all_dim", float, 0.0),
    ),
    Stretch.llama3: (
        FACTOR,
        LENGTH,
        Field("rope.beta_fast", "high_freq_factor", float),
        Field("rope.beta_slow", "low_freq_factor", float),
    ),
}
# Weights in 8 bits by blocks, as DeepSeek-V3's; V3.1's scales are powers of two, and say so.
QUANTISED = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
QUANTISATION = {"quantization_config": (None, QUANTISED, QUANTISED | {"scale_fmt": "ue8m0"})}
# What the same weights may be trained with. Which layers route is compared by itself.
TRAINING = {"name", "init_std", "recompute", "moe.aux_alpha", "moe.bias_speed", "moe.pad", "mtp.depth", "mtp.weight"}
LAYERS = {"dense_layers", "moe.every", "moe.skip"}


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


def describe(config: ModelConfig, dtype: str, eos: int | None = None) -> Values:
    """The config.json of a model; ``dtype``: "bfloat16"; ``eos``: the token that ends a text.

    ValueError, with our key, for a model that no published layout can express."""
    family = find(config)
    family.refuse(config)
    values: Values = {"architectures": [family.architecture], "model_type": family.model_type}
    values |= {field.published: get(config, field.ours) for field in family.fields}
    values |= {
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        **family.said,
        "max_position_embeddings": int(config.rope.original_length * config.rope.factor),
        "rope_scaling": _describe_rope(config),
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos,
    }
    return family.write(values, config)


def compare(config: ModelConfig, folder: Path) -> Published:
    """What is in ``folder``; ValueError, with our key and both values, where a ``config`` to be filled differs from it.

    How positions are stretched may differ, as contexts are in training, and ``config`` may leave MTP modules out."""
    published = read_published(folder)
    theirs, file = published.config, folder / FILE
    names = {field.ours: field.published for field in BY_TYPE[theirs.name].fields}
    routed = config.moe.experts > 0 or theirs.moe.experts > 0
    for key in list_keys(config):
        if key in TRAINING | LAYERS or (key.startswith("rope.") and key != "rope.theta"):
            continue
        if key.startswith("moe.") and not routed:
            continue
        wanted, found = get(config, key), get(theirs, key)
        if wanted != found:
            raise ValueError(f"model.{key}={say(wanted)} must be {say(found)}, {names.get(key, 'that')} of {file}")
    for layer in range(config.num_layers):
        if config.is_moe(layer) != theirs.is_moe(layer):
            is_to = "route" if theirs.is_moe(layer) else "not route"
            raise ValueError(
                f"model.dense_layers={config.dense_layers}, moe.every={config.moe.every} and moe.skip must have layer "
                f"{layer} {is_to} its tokens, as {file} says"
            )
    if config.mtp.depth > theirs.mtp.depth:
        raise ValueError(
            f"model.mtp.depth={config.mtp.depth} must be at most {theirs.mtp.depth}, num_nextn_predict_layers of {file}"
        )
    return published


def list_keys(config: Any, prefix: str = "") -> list[str]:
    """The dotted keys of all values, in order."""
    keys = []
    for field in fields(config):
        value = getattr(config, field.name)
        keys += list_keys(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return keys


def _parse(values: Values) -> ModelConfig:
    family = BY_TYPE.get(str(values.get("model_type")))
    if family is None:
        raise ValueError(f"model_type={values.get('model_type')} must be one of {', '.join(BY_TYPE)}")
    _check_fixed(values, family)
    # The newer name holds the base and the rotated share as well, and MTP's key has a newer name too.
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_scaling={json.dumps(scaling)} must be an object or null")
    moved = {key: scaling[key] for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    scaling = {key: value for key, value in scaling.items() if key not in moved}
    values = {"rope_theta": 10000.0} | moved | values
    if "num_mtp_layers" in values:
        values = {"num_nextn_predict_layers": values["num_mtp_layers"]} | values
    values = family.read(values)
    parsed: dict[str, Values] = {"": {}, "attention": {}, "rope": {}, "moe": {}, "mtp": {}}
    found = {field.ours: _read(values, field) for field in family.fields}
    for key, value in (found | dict(family.chosen)).items():
        section, _, name = key.rpartition(".")
        parsed[section][name] = tuple(value) if isinstance(value, list) else value
    parsed["rope"] |= _parse_rope(scaling, values)
    return ModelConfig(
        name=family.model_type,
        **parsed[""],
        attention=AttentionConfig(**parsed["attention"]),
        rope=RopeConfig(**parsed["rope"]),
        moe=MoEConfig(**parsed["moe"]),
        mtp=MTPConfig(**parsed["mtp"]),
    )


def _check_fixed(values: Values, family: Family) -> None:
    for key, allowed in {**family.fixed, **QUANTISATION}.items():
        if key in values and values[key] not in allowed:
            supported = " or ".join(json.dumps(value) for value in allowed if value is not None)
            raise ValueError(
                f"{key}={json.dumps(values[key])} is not supported" + (f", only {supported}" if supported else "")
            )


def _parse_rope(scaling: Values, values: Values) -> Values:
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if kind == "default":
        return {"original_length": _read(values, Field("", "max_position_embeddings", int, 4096))}
    if kind not in STRETCHES:
        raise ValueError(f"rope_scaling.type={json.dumps(kind)} is not supported, only {' or '.join(STRETCHES)}")
    known = STRETCHES[Stretch(kind)]
    for key in sorted(scaling.keys() - {field.published for field in known}):
        if scaling[key] is not None:
            raise ValueError(f"rope_scaling.{key}={json.dumps(scaling[key])} is not supported")
    parsed = {field.ours.removeprefix("rope."): _read(scaling, field, "rope_scaling.") for field in known}
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    # What a lone one of the two means, the published code and transformers disagree about.
    if not (mscale and all_dim) and (all_dim or mscale not in (None, 1)):
        raise ValueError(
            f"rope_scaling.mscale={mscale} with rope_scaling.mscale_all_dim={all_dim} is not supported: "
            "either both are given, or mscale is 1 and mscale_all_dim is 0"
        )
    return parsed | {"stretch": Stretch(kind)}


def _describe_rope(config: ModelConfig) -> Values | None:
    rope = config.rope
    if rope.factor == 1.0:
        return None
    yarn = rope.stretch is Stretch.yarn
    if yarn and (not rope.mscale or (not rope.mscale_all_dim and rope.mscale != 1.0)):
        raise ValueError(
            f"model.rope.mscale={rope.mscale} cannot be published with model.rope.mscale_all_dim={rope.mscale_all_dim}"
        )
    kind = {"type" if yarn else "rope_type": rope.stretch.value}
    return kind | {field.published: get(config, field.ours) for field in STRETCHES[rope.stretch]}


def _read(values: Values, field: Field, prefix: str = "") -> Any:
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
