"""Configuration of the model: sizes and the few choices that families of transformers differ in.

Standard library only, so that composing a configuration never loads torch. Every mistake is a ``ValueError`` that
names the dotted key, the value and the rule.
"""

from dataclasses import dataclass, field
from enum import StrEnum


class ScoreFunction(StrEnum):
    """How router logits become scores: DeepSeek-V3 uses a sigmoid, DeepSeek-V2 a softmax."""

    sigmoid = "sigmoid"
    softmax = "softmax"


class Recompute(StrEnum):
    """What the backward computes again instead of keeping.

    ``selective`` keeps the inputs of RMSNorm, the MLA latents and the fused gate/up product and computes the norms, the
    MLA up-projections and the SwiGLU output again (DeepSeek-V3, section 3.2.3); ``full`` keeps only the inputs of each
    compute segment. Communication and routing decisions are always kept.
    """

    none = "none"
    selective = "selective"
    full = "full"


class AttentionKind(StrEnum):
    """How keys and values are made; also the name of the module that does."""

    mla = "mla"  # widened from one latent of all heads
    gqa = "gqa"  # projected, each shared by a group of query heads


@dataclass(kw_only=True, slots=True)
class AttentionConfig:
    """Multi-head latent attention (arXiv 2405.04434, section 2.1) with ``kv_rank``; grouped-query attention
    (arXiv 2305.13245) with ``kv_heads``. One of the two is null.
    """

    heads: int
    kv_rank: int | None = None  # width of the key/value latent, the part of the cache shared by all heads
    kv_heads: int | None = None  # heads of keys and values, each read by heads / kv_heads heads of queries
    nope_dim: int  # per-head query and key width without position; grouped: 0, where a head is rotated as a whole
    rope_dim: int  # per-head width with position; latent: one key of this width is shared by all heads
    v_dim: int  # per-head value width
    q_rank: int | None = None  # latent: width of the query latent; null: queries are projected directly
    qk_norm: bool = False  # grouped: each head's query and key is normalised before it is rotated
    bias: bool = False  # grouped: queries, keys and values have biases

    def __post_init__(self) -> None:
        for name in ("heads", "rope_dim", "v_dim"):
            _positive(f"model.attention.{name}", getattr(self, name))
        for name in ("kv_rank", "kv_heads", "q_rank"):
            if getattr(self, name) is not None:
                _positive(f"model.attention.{name}", getattr(self, name))
        if self.rope_dim % 2:
            raise ValueError(f"model.attention.rope_dim={self.rope_dim} must be even: it is rotated in pairs")
        if (self.kv_rank is None) == (self.kv_heads is None):
            raise ValueError(
                f"model.attention.kv_rank={_say(self.kv_rank)} and model.attention.kv_heads={_say(self.kv_heads)}: "
                "one must be null; with kv_rank attention is latent (MLA), with kv_heads grouped (GQA)"
            )
        if self.kv_heads is None:
            self._check_latent()
        else:
            self._check_grouped(self.kv_heads)

    @property
    def kind(self) -> AttentionKind:
        """Latent or grouped."""
        return AttentionKind.mla if self.kv_heads is None else AttentionKind.gqa

    @property
    def width(self) -> int:
        """Of a head's query and key."""
        return self.nope_dim + self.rope_dim

    def _check_latent(self) -> None:
        _positive("model.attention.nope_dim", self.nope_dim)
        for name in ("qk_norm", "bias"):
            if getattr(self, name):
                raise ValueError(
                    f"model.attention.{name}=true needs model.attention.kv_heads: latent attention has none"
                )

    def _check_grouped(self, kv_heads: int) -> None:
        if self.heads % kv_heads:
            raise ValueError(
                f"model.attention.kv_heads={kv_heads} must divide model.attention.heads={self.heads}: each head of "
                "keys and values is read by equally many of queries"
            )
        if self.nope_dim < 0:
            raise ValueError(f"model.attention.nope_dim={self.nope_dim} must not be negative")
        if self.q_rank is not None:
            raise ValueError(
                f"model.attention.q_rank={self.q_rank} must be null with model.attention.kv_heads={kv_heads}: "
                "only latent attention has latents"
            )


class Stretch(StrEnum):
    """How rotary positions are stretched: which frequencies are divided, and what else changes."""

    yarn = "yarn"  # a ramp over pairs of numbers, and a temperature by the mscales (arXiv 2309.00071)
    llama3 = "llama3"  # a ramp over rotations, and nothing else (arXiv 2407.21783, Llama 3.1)


@dataclass(kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864), stretched where ``factor`` exceeds 1."""

    theta: float = 10000.0
    factor: float = 1.0  # context length / original_length; 1 means plain RoPE
    stretch: Stretch = Stretch.yarn
    original_length: int = 4096  # positions seen before stretching
    beta_fast: float = 32.0  # rotations within original_length above which a frequency is kept
    beta_slow: float = 1.0  # rotations below which it is divided by factor
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ValueError(f"model.rope.theta={self.theta} must be positive")
        if self.factor < 1:
            raise ValueError(f"model.rope.factor={self.factor} must be at least 1 (1: nothing is stretched)")
        # Kimi K2 has both at 1: a ramp between two neighbours. Llama's is over rotations, and needs some between.
        if self.beta_slow > self.beta_fast or (self.beta_slow == self.beta_fast and self.stretch is Stretch.llama3):
            raise ValueError(
                f"model.rope.beta_slow={self.beta_slow} must be below model.rope.beta_fast={self.beta_fast}"
            )
        _positive("model.rope.original_length", self.original_length)


@dataclass(kw_only=True, slots=True)
class MoEConfig:
    """Routed and shared experts (DeepSeek-V3, section 2.1.2). No token is ever dropped."""

    experts: int = 0  # routed experts a layer; 0: every layer is dense
    top_k: int = 1  # routed experts a token
    ffn: int = 0  # intermediate width of one expert
    shared_experts: int = 0  # experts every token visits; computed as one expert of shared_experts * ffn
    groups: int = 1  # experts are split into this many groups...
    top_groups: int = 1  # ...of which a token may use this many (node-limited routing)
    score: ScoreFunction = ScoreFunction.sigmoid
    normalize_gates: bool = True  # gates of the chosen experts sum to gate_scale
    gate_scale: float = 1.0
    aux_alpha: float = 1e-4  # weight of the sequence-wise auxiliary loss
    bias_speed: float = 1e-3  # step of the selection bias against the load error, once an optimizer step
    every: int = 1  # of the layers after model.dense_layers, each so-manieth routes: those where this divides 1 + layer
    skip: tuple[int, ...] = ()  # layers that are dense besides
    pad: int = 32  # each expert's rows are padded to a multiple of this, so that product shapes repeat

    def __post_init__(self) -> None:
        if self.experts == 0:
            return
        for name in ("experts", "top_k", "ffn", "groups", "top_groups", "every", "pad"):
            _positive(f"model.moe.{name}", getattr(self, name))
        if self.shared_experts < 0:
            raise ValueError(f"model.moe.shared_experts={self.shared_experts} must not be negative")
        if self.experts % self.groups:
            raise ValueError(f"model.moe.groups={self.groups} must divide model.moe.experts={self.experts}")
        if self.top_groups > self.groups:
            raise ValueError(f"model.moe.top_groups={self.top_groups} must not exceed model.moe.groups={self.groups}")
        reachable = self.experts // self.groups * self.top_groups
        if self.top_k > reachable:
            raise ValueError(
                f"model.moe.top_k={self.top_k} must not exceed the {reachable} experts in "
                f"model.moe.top_groups={self.top_groups} of model.moe.groups={self.groups} groups"
            )
        for name in ("aux_alpha", "bias_speed"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.moe.{name}={getattr(self, name)} must not be negative")


@dataclass(kw_only=True, slots=True)
class MTPConfig:
    """Multi-token prediction (DeepSeek-V3, section 2.2): ``depth`` extra blocks, each predicting one token further."""

    depth: int = 0
    weight: float = 0.3  # of the mean of the depths' losses

    def __post_init__(self) -> None:
        if self.depth < 0:
            raise ValueError(f"model.mtp.depth={self.depth} must not be negative")
        if self.weight < 0:
            raise ValueError(f"model.mtp.weight={self.weight} must not be negative")


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """A transformer. ``dense_layers`` leading blocks have a plain SwiGLU of width ``ffn``, the others experts."""

    name: str
    vocab_size: int
    num_layers: int
    hidden: int
    ffn: int
    dense_layers: int = 1
    norm_eps: float = 1e-6
    init_std: float = 0.006
    tied: bool = False  # the output head is the embedding
    recompute: Recompute = Recompute.none
    attention: AttentionConfig
    rope: RopeConfig = field(default_factory=RopeConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "hidden", "ffn"):
            _positive(f"model.{name}", getattr(self, name))
        if not 0 <= self.dense_layers <= self.num_layers:
            raise ValueError(
                f"model.dense_layers={self.dense_layers} must lie in 0..model.num_layers={self.num_layers}"
            )
        if strays := [layer for layer in self.moe.skip if not 0 <= layer < self.num_layers]:
            raise ValueError(f"model.moe.skip has {strays[0]}, which must be a layer, 0..{self.num_layers - 1}")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be positive")

    def is_moe(self, layer: int) -> bool:
        """Whether block ``layer`` routes its tokens; the blocks of MTP count on from ``num_layers``, and all do."""
        moe = self.moe
        chosen = layer >= self.dense_layers and (layer + 1) % moe.every == 0 and layer not in moe.skip
        return moe.experts > 0 and (chosen or layer >= self.num_layers)

    def routed_blocks(self) -> list[int]:
        """The blocks that route their tokens, those of MTP included."""
        return [block for block in range(self.num_layers + self.mtp.depth) if self.is_moe(block)]


def _say(value: int | None) -> str:
    return "null" if value is None else str(value)


def _positive(key: str, value: int) -> None:
    if value <= 0:
        raise ValueError(f"{key}={value} must be positive")
