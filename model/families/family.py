"""What a family of published models is here: which of its keys are which of ours, what it fixes, what it refuses.

A family is a value of ``Family`` in a file of its own and a row of ``FAMILIES`` (model/families/table.py). Reading and
writing ``config.json`` is one loop over its fields (model/huggingface_config.py); how its tensors are called, which
hardly differs, is one table for all (model/huggingface_names.py). Standard library only.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from model.config import ModelConfig

Values = dict[str, Any]  # of a config.json


class Field(NamedTuple):
    """A value that both have. Without a default it must be there."""

    ours: str
    published: str
    kind: type
    default: Any = ...


def keep(values: Values) -> Values:
    """Nothing to change."""
    return values


def take_all(config: ModelConfig) -> None:
    """Nothing to refuse."""


@dataclass(frozen=True, slots=True)
class Family:
    """``read`` and ``write`` turn published values into those that ``fields`` name, and back.

    ``refuse`` raises ValueError for a model that fits, but has a choice that the family has no key for.
    """

    model_type: str
    architecture: str
    fits: Callable[[ModelConfig], bool]  # which of our models are published so
    fields: tuple[Field, ...]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # what its keys may say, where they are there
    chosen: Mapping[str, Any] = field(default_factory=dict)  # our keys that are the same in all of its models
    said: Mapping[str, Any] = field(default_factory=dict)  # keys that an export writes besides
    biased: bool = False  # its routers have selection biases, and they are published
    read: Callable[[Values], Values] = keep
    write: Callable[[Values, ModelConfig], Values] = lambda values, config: values
    refuse: Callable[[ModelConfig], None] = take_all


# Of every family.
SIZES = (
    Field("vocab_size", "vocab_size", int),
    Field("num_layers", "num_hidden_layers", int),
    Field("hidden", "hidden_size", int),
    Field("ffn", "intermediate_size", int),
    Field("norm_eps", "rms_norm_eps", float, 1e-6),
    Field("init_std", "initializer_range", float, 0.02),
    Field("tied", "tie_word_embeddings", bool, False),
    Field("attention.heads", "num_attention_heads", int),
    Field("rope.theta", "rope_theta", float, 10000.0),
)
# Of those with DeepSeek-V2's and V3's routers.
ROUTERS = (
    Field("moe.experts", "n_routed_experts", int, 0),
    Field("moe.top_k", "num_experts_per_tok", int, 1),
    Field("moe.ffn", "moe_intermediate_size", int, 0),
    Field("moe.shared_experts", "n_shared_experts", int, 0),
    Field("moe.groups", "n_group", int, 1),
    Field("moe.top_groups", "topk_group", int, 1),
    Field("moe.normalize_gates", "norm_topk_prob", bool, True),
    Field("moe.gate_scale", "routed_scaling_factor", float, 1.0),
    Field("dense_layers", "first_k_dense_replace", int, 0),
)
FIXED: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu",), "attention_dropout": (0.0, None), "mlp_bias": (False,)}


def get(config: ModelConfig, key: str) -> Any:
    """A value by its dotted key, which does not begin with ``model.``."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def refuse_others(config: ModelConfig, family: str, **wanted: Any) -> None:
    """Raises ValueError unless ``config`` has the values ``wanted``, whose keys have __ for their dots."""
    for name, value in wanted.items():
        key = name.replace("__", ".")
        if (found := get(config, key)) != value:
            raise ValueError(f"model.{key}={say(found)} cannot be published as {family}, only {say(value)}")


def say(value: Any) -> str:
    """As a user writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
