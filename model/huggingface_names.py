"""Which published tensor is which part of which of ours: one table, read in both directions.

    ours                                  published                                   how
    attention.mla.q_kv_a [q + kv + R, H]  q_a_proj [q, H]; kv_a_proj_with_mqa         rows of one fused product
    mlp.swiglu.gate_up [2, F, H]          gate_proj [F, H]; up_proj [F, H]            two planes
    experts.routed.gate_up [E, 2, F, H]   experts.0.gate_proj [F, H]; ...             a plane an expert
    attention.gqa.qkv [K, G D + 2 D, H]   q_proj [K G D, H]; k_proj; v_proj           rows of each of K heads

One table for all families: a model has the rows whose tensors it has. Every published tensor is a region of one of
ours, up to the order of its rows or columns:

    rotary rows    published: neighbours are a pair, x[2i] and x[2i+1];  ours: halves, x[i] and x[i + R/2]
    eh_proj        published: columns [embedding; hidden];  ours: [hidden; embedding], as in the paper

so a row of the table is (our name, their name, region, order), and copying either way is the same loop. The order of
eh_proj is what inference engines and `transformers` use with the published weights (DeepSeek-V3's paper, equation 21,
has it the other way round). Shapes: H hidden, F intermediate, E experts, R rotary width, q and kv the latents' ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig
from model.families.table import find
from model.shards import Index


class Order(NamedTuple):
    """ours = published.index_select(dim, places)."""

    dim: int
    places: Tensor

    def invert(self) -> "Order":
        """published = ours.index_select(dim, places)."""
        return Order(self.dim, self.places.argsort())


class Piece(NamedTuple):
    """A published tensor and the region of ours that it is."""

    ours: str
    region: Index
    published: str
    order: Order | None
    joined: bool = False  # the first two dims of the region are one there

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The published one, of one of ours with the shape ``whole``."""
        first, *rest = torch.empty(whole, device="meta")[self.region].shape
        return (first * rest[0], *rest[1:]) if self.joined else (first, *rest)


class Row(NamedTuple):
    """A row of the table; names follow those of the block they are in, ``{expert}`` stands for each expert."""

    ours: str
    published: str
    region: Callable[[ModelConfig], Index] = lambda config: ()
    order: Callable[[ModelConfig], Order] | None = None
    joined: bool = False


def _gate(config: ModelConfig) -> Index:
    return (0,)


def _up(config: ModelConfig) -> Index:
    return (1,)


def _query_latent(config: ModelConfig) -> Index:
    return (slice(0, config.attention.q_rank),)


def _key_latent(config: ModelConfig) -> Index:
    start = config.attention.q_rank or 0
    return (slice(start, start + _rank(config) + config.attention.rope_dim),)


def _rank(config: ModelConfig) -> int:
    """Width of the latent of keys and values, where attention has one."""
    rank = config.attention.kv_rank
    assert rank is not None
    return rank


def _query(config: ModelConfig) -> Index:
    return (slice(None), slice(0, _group(config)))


def _key(config: ModelConfig) -> Index:
    return (slice(None), slice(_group(config), _group(config) + config.attention.width))


def _value(config: ModelConfig) -> Index:
    start = _group(config) + config.attention.width
    return (slice(None), slice(start, start + config.attention.v_dim))


def _group(config: ModelConfig) -> int:
    """Rows of the queries that read a head of keys and values."""
    a = config.attention
    assert a.kv_heads is not None
    return a.heads // a.kv_heads * a.width


def _pair(width: int) -> Tensor:
    """Where the halves [x0 x2 ... | x1 x3 ...] lie among neighbours."""
    return torch.arange(width).view(-1, 2).t().flatten()


def _key_rows(config: ModelConfig) -> Order:
    """[kv_rank | R]: the rotary key comes after the latent."""
    rank = _rank(config)
    return Order(0, torch.cat((torch.arange(rank), rank + _pair(config.attention.rope_dim))))


def _query_rows(config: ModelConfig) -> Order:
    """[heads, nope | R]: the rotary part comes last in each head."""
    a = config.attention
    head = torch.cat((torch.arange(a.nope_dim), a.nope_dim + _pair(a.rope_dim)))
    return Order(0, (torch.arange(a.heads)[:, None] * len(head) + head).flatten())


def _halves(config: ModelConfig) -> Order:
    return Order(1, torch.arange(2 * config.hidden).roll(config.hidden))


MODEL = (
    Row("embedding.weight", "model.embed_tokens.weight"),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
)
BLOCK = (
    Row("attention.norm.weight", "input_layernorm.weight"),
    Row("attention.mla.q.weight", "self_attn.q_proj.weight", order=_query_rows),
    Row("attention.mla.kv_a.weight", "self_attn.kv_a_proj_with_mqa.weight", order=_key_rows),
    Row("attention.mla.q_kv_a.weight", "self_attn.q_a_proj.weight", _query_latent),
    Row("attention.mla.q_kv_a.weight", "self_attn.kv_a_proj_with_mqa.weight", _key_latent, _key_rows),
    Row("attention.mla.q_norm.weight", "self_attn.q_a_layernorm.weight"),
    Row("attention.mla.q_b.weight", "self_attn.q_b_proj.weight", order=_query_rows),
    Row("attention.mla.kv_norm.weight", "self_attn.kv_a_layernorm.weight"),
    Row("attention.mla.kv_b.weight", "self_attn.kv_b_proj.weight"),
    Row("attention.mla.o.weight", "self_attn.o_proj.weight"),
    *(
        Row(f"attention.gqa.{ours}", f"self_attn.{part}_proj.{kind}", region, joined=True)
        for ours, kind in (("qkv.weight", "weight"), ("bias", "bias"))
        for part, region in (("q", _query), ("k", _key), ("v", _value))
    ),
    Row("attention.gqa.q_norm.weight", "self_attn.q_norm.weight"),
    Row("attention.gqa.k_norm.weight", "self_attn.k_norm.weight"),
    Row("attention.gqa.o.weight", "self_attn.o_proj.weight"),
    Row("attention.mlp_norm.weight", "post_attention_layernorm.weight"),
    Row("mlp.swiglu.gate_up.weight", "mlp.gate_proj.weight", _gate),
    Row("mlp.swiglu.gate_up.weight", "mlp.up_proj.weight", _up),
    Row("mlp.swiglu.down.weight", "mlp.down_proj.weight"),
    Row("attention.router.weight", "mlp.gate.weight"),
    Row("attention.router.bias", "mlp.gate.e_score_correction_bias"),
    Row("experts.routed.gate_up.weight", "mlp.experts.{expert}.gate_proj.weight", _gate),
    Row("experts.routed.gate_up.weight", "mlp.experts.{expert}.up_proj.weight", _up),
    Row("experts.routed.down.weight", "mlp.experts.{expert}.down_proj.weight"),
    Row("experts.shared.gate_up.weight", "mlp.shared_experts.gate_proj.weight", _gate),
    Row("experts.shared.gate_up.weight", "mlp.shared_experts.up_proj.weight", _up),
    Row("experts.shared.down.weight", "mlp.shared_experts.down_proj.weight"),
)
MTP = (
    Row("embedding_norm.weight", "enorm.weight"),
    Row("hidden_norm.weight", "hnorm.weight"),
    Row("project.weight", "eh_proj.weight", order=_halves),
    Row("norm.weight", "shared_head.norm.weight"),
)
# Weights that the published layout repeats in every MTP module.
MTP_COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def cut(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], interleaved: bool = True) -> list[Piece]:
    """Every piece of the tensors of ours named in ``shapes``, in the order of the layers.

    ``interleaved``: the published rotary pairs are neighbours. False: they are halves, as ours."""
    pieces, biased = [], is_biased(config)
    for ours, published, rows in _sections(config):
        for row in rows:
            if ours + row.ours in shapes and (biased or row.ours != "attention.router.bias"):
                order = row.order(config) if row.order and (interleaved or row.order is _halves) else None
                experts = range(shapes[ours + row.ours][0]) if "{expert}" in row.published else [None]
                for expert in experts:
                    region = row.region(config) if expert is None else (expert, *row.region(config))
                    name = published + row.published.replace("{expert}", str(expert))
                    pieces.append(Piece(ours + row.ours, region, name, order, row.joined))
    return pieces


def repeat(config: ModelConfig) -> dict[str, str]:
    """Names in the published MTP modules of weights that are a copy of another, and the name of that other."""
    head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
    prefixes = [f"model.layers.{config.num_layers + d}." for d in range(config.mtp.depth)]
    return {
        prefix + copy: head if original == "lm_head.weight" else original
        for prefix in prefixes
        for copy, original in MTP_COPIES.items()
    }


def is_biased(config: ModelConfig) -> bool:
    """Whether selection biases of its routers are published: softmax routers have none."""
    return find(config).biased


def _sections(config: ModelConfig) -> Iterator[tuple[str, str, tuple[Row, ...]]]:
    """(our prefix, published prefix, rows). MTP's modules count on from the last layer."""
    yield "", "", MODEL
    for layer in range(config.num_layers):
        yield f"layers.{layer}.", f"model.layers.{layer}.", BLOCK
    for d in range(config.mtp.depth):
        layer = config.num_layers + d
        yield f"mtp.{d}.", f"model.layers.{layer}.", MTP
        yield f"mtp.{d}.block.", f"model.layers.{layer}.", BLOCK
