"""Parameters and floating-point operations of a model, by arithmetic alone: nothing is allocated, torch is not loaded.

    latent      H (q_rank + kv_rank + rope)  +  q_rank heads (nope + rope)  +  kv_rank heads (nope + v)  +  heads v H
    grouped     H (heads + kv_heads) (nope + rope)  +  H kv_heads v  +  heads v H
    dense mlp   3 H F        expert   3 H F_e        router   E H        MTP depth   2 H H + a block

A parameter is active when a token's forward uses it: of the routed experts, top_k of E. FLOPs a token: two for every
weight a token is multiplied with (the embedding is looked up, not multiplied) and, for causal attention over S tokens,
heads (nope + rope + v) S, half of what full attention takes. The backward costs twice the forward. What is done again
(recomputation) or done for nothing (padding rows) is not counted: these are the operations a model needs.
"""

from dataclasses import dataclass, replace

from model.config import AttentionConfig, ModelConfig


@dataclass(frozen=True, slots=True)
class Amount:
    """Parameters of a part: all of them, those one token uses, and those of the latter that it is multiplied with."""

    total: int = 0
    active: int = 0
    multiplied: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.total + other.total, self.active + other.active, self.multiplied + other.multiplied)

    def __mul__(self, times: int) -> "Amount":
        return Amount(self.total * times, self.active * times, self.multiplied * times)


@dataclass(frozen=True, slots=True)
class Parameters:
    """A model's parameters by part. Selection biases of routers are buffers and do not count."""

    embedding: Amount
    attention: Amount
    dense: Amount  # SwiGLU of the leading layers
    router: Amount
    shared: Amount
    routed: Amount
    norms: Amount
    head: Amount  # no parameters of its own when tied, but as many multiplications
    mtp: Amount  # everything that MTP adds

    @property
    def main(self) -> Amount:
        """The model without MTP: what is published as a model's size."""
        parts = (
            self.embedding,
            self.attention,
            self.dense,
            self.router,
            self.shared,
            self.routed,
            self.norms,
            self.head,
        )
        return sum(parts, Amount())

    @property
    def trained(self) -> Amount:
        """The model with MTP."""
        return self.main + self.mtp


def count(config: ModelConfig) -> Parameters:
    """The parameters of a model; their sum equals that of the real ``Transformer``."""
    table = _matrix(config.vocab_size * config.hidden)
    blocks = _count_blocks(config, [config.is_moe(layer) for layer in range(config.num_layers)])
    extra = config.is_moe(config.num_layers)
    depth = _count_blocks(config, [extra])
    join = _matrix(2 * config.hidden**2) + _vector(3 * config.hidden)
    # The head is the main model's: each depth multiplies with it again and adds no parameter.
    borrowed = Amount(multiplied=table.multiplied)
    return Parameters(
        embedding=Amount(table.total, table.total, 0),
        **{**blocks, "norms": blocks["norms"] + _vector(config.hidden)},
        head=Amount(0, 0, table.multiplied) if config.tied else table,
        mtp=(sum(depth.values(), Amount()) + join + borrowed) * config.mtp.depth,
    )


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations a token costs in training, MTP included: forward and twice that for the backward."""
    return 3 * forward_flops(config, sequence_length)


def forward_flops(config: ModelConfig, sequence_length: int) -> float:
    """Floating-point operations a token costs in the forward, averaged over a sequence of ``sequence_length``."""
    a = config.attention
    core = a.heads * (a.width + a.v_dim) * sequence_length
    return 2 * count(config).trained.multiplied + core * (config.num_layers + config.mtp.depth)


def count_layer(config: ModelConfig, layer: int) -> Amount:
    """The parameters of one block; those of MTP count on from ``num_layers``."""
    return sum(_count_blocks(config, [config.is_moe(layer)]).values(), Amount())


def without_mtp(config: ModelConfig) -> ModelConfig:
    """The same model without multi-token prediction."""
    return replace(config, mtp=replace(config.mtp, depth=0))


def _count_blocks(config: ModelConfig, moe: list[bool]) -> dict[str, Amount]:
    """The parts of as many blocks as ``moe`` has entries, which say whether a block routes its tokens."""
    a, m, hidden = config.attention, config.moe, config.hidden
    expert, routing = 3 * hidden * m.ffn, sum(moe)
    chosen = min(m.top_k, m.experts)
    norms = 2 * hidden + count_norms(a)
    return {
        "attention": (_matrix(_count_attention(config)) + _vector(count_biases(a))) * len(moe),
        "dense": _matrix(3 * hidden * config.ffn) * (len(moe) - routing),
        "router": _matrix(m.experts * hidden) * routing,
        "shared": _matrix(m.shared_experts * expert) * routing,
        "routed": Amount(m.experts * expert, chosen * expert, chosen * expert) * routing,
        "norms": _vector(norms) * len(moe),
    }


def _count_attention(config: ModelConfig) -> int:
    a = config.attention
    query = a.heads * a.width
    if a.kv_rank is None:
        kv_heads = a.kv_heads or 0
        return config.hidden * (query + kv_heads * (a.width + a.v_dim) + a.heads * a.v_dim)
    queries = config.hidden * query if a.q_rank is None else a.q_rank * (config.hidden + query)
    down = config.hidden * (a.kv_rank + a.rope_dim)
    return queries + down + a.kv_rank * a.heads * (a.nope_dim + a.v_dim) + a.heads * a.v_dim * config.hidden


def count_norms(a: AttentionConfig) -> int:
    """Of one attention, beside the two of its block."""
    return (a.kv_rank or 0) + (a.q_rank or 0) + (2 * a.width if a.qk_norm else 0)


def count_biases(a: AttentionConfig) -> int:
    """Of one attention."""
    return a.heads * a.width + (a.kv_heads or 0) * (a.width + a.v_dim) if a.bias else 0


def _matrix(size: int) -> Amount:
    return Amount(size, size, size)


def _vector(size: int) -> Amount:
    return Amount(size, size, 0)
