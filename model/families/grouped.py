"""Families with grouped-query attention: what they share.

num_key_value_heads  <->  attention.kv_heads
head_dim             <->  attention.rope_dim + nope_dim, and v_dim     without it, hidden_size / heads
partial_rotary_factor     the share of head_dim that is rotated: 1 in most
"""

from typing import Any

from model.config import AttentionKind, ModelConfig
from model.families.family import SIZES, Field, Values

TURNED, REST = "head_dim * partial_rotary_factor", "head_dim * (1 - partial_rotary_factor)"
GROUPED = (
    *SIZES,
    Field("attention.kv_heads", "num_key_value_heads", int),
    Field("attention.rope_dim", TURNED, int),
    Field("attention.nope_dim", REST, int),
    Field("attention.v_dim", "head_dim", int),
)


def read_heads(values: Values, share: float = 1.0) -> Values:
    """What ``GROUPED`` names. ``share``: the factor where there is none."""
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    values = {"num_key_value_heads": heads} | values
    if values.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        values["head_dim"] = hidden // heads
    width, share = values.get("head_dim"), values.get("partial_rotary_factor") or share
    if isinstance(width, int) and isinstance(share, int | float):
        values |= {TURNED: int(width * share), REST: width - int(width * share)}
    return values


def write_heads(values: Values, config: ModelConfig) -> Values:
    """``head_dim`` and the factor in the place of what ``GROUPED`` names."""
    a = config.attention
    if a.v_dim != a.width:
        raise ValueError(
            f"model.attention.v_dim={a.v_dim} cannot be published with model.attention.kv_heads: there it is "
            f"rope_dim + nope_dim = {a.width}"
        )
    said: dict[str, Any] = {name: value for name, value in values.items() if name not in (TURNED, REST)}
    return said | {"head_dim": a.width} | ({"partial_rotary_factor": a.rope_dim / a.width} if a.nope_dim else {})


def is_grouped(config: ModelConfig) -> bool:
    """Whether a model is of one of these families."""
    return config.attention.kind is AttentionKind.gqa
