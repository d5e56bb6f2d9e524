"""Attention of two kinds, of which a model has one.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1; figure 3 there):

    x [B, S, H] -- q_kv_a --> q latent [q_rank] | kv latent [kv_rank] | rotary key [rope]    (one fused product)
    q latent  -- norm -- q_b  --> q    [heads, nope + rope]      the rope part is rotated
    kv latent -- norm -- kv_b --> k, v [heads, nope], [heads, v]
    k = (k, rotary key shared by all heads);   out = softmax(scale q k^T) v;   o [heads * v] -> [H]

Without query compression, q is its own product of x. Only the kv latent and the rotary key need to be cached for
generation: kv_rank + rope numbers a token.

Grouped-query attention (arXiv 2305.13245), as Llama 3, Qwen3 and GLM-4.5 have it:

    x -- qkv --> of each head of keys and values    [q 0 | ... | q G-1 | k | v]      with the G queries that read it
    q, k -- norm over a head, where the family has it -- rotated in their first ``rope`` numbers
    out = softmax(scale q k^T) v, each k and v read G times;   o [heads * v] -> [H]

Only k and v need to be cached: kv_heads (nope + rope + v) numbers a token.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.config import AttentionKind, ModelConfig
from model.core import Core, attend
from model.linear import Deferred, Linear
from model.product import matmul
from model.rope import rotate, softmax_scale
from model.sequence import Sequence, WholeSequence


@dataclass
class Cache:
    """The tokens seen so far, per layer: the kv latent [B, S, kv_rank] and the rotated key [B, S, rope]; of grouped
    attention, keys [B, S, kv_heads, D] and values [B, S, kv_heads, V].
    """

    layers: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens seen."""
        return next((first.shape[1] for first, *_ in self.layers.values()), 0)

    def extend(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append a layer's new tokens, in each tensor's second dim, and return all of its tokens."""
        if layer in self.layers:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.layers[layer], new, strict=True))
        self.layers[layer] = new
        return new


class Context(NamedTuple):
    """What every block of one micro-batch shares."""

    cos: Tensor  # [S, rope / 2]
    sin: Tensor
    documents: Tensor | None = None  # [B, S]
    deferred: Deferred = None  # collects weight gradients to compute later
    cache: Cache | None = None  # generation only


class LatentAttention(nn.Module):
    """MLA. ``core`` is the seam behind which context parallelism works, ``sequence`` that of tensor parallelism.

    Latents and the rotary key come from a shard of the sequence; heads, as many as the weights have, see all of it.
    """

    def __init__(self, config: ModelConfig, layer: int, core: Core = attend) -> None:
        super().__init__()
        a = config.attention
        assert a.kv_rank is not None
        self.layer, self.core, self.sizes = layer, core, a
        self.sequence: Sequence = WholeSequence()
        self.scale = softmax_scale(config.rope, a)
        kv_a = a.kv_rank + a.rope_dim
        query = a.heads * a.width
        if a.q_rank is None:
            self.q = Linear(config.hidden, query)
            self.kv_a = Linear(config.hidden, kv_a)
        else:
            self.q_kv_a = Linear(config.hidden, a.q_rank + kv_a, sizes=(a.q_rank, kv_a))
            self.q_norm = nn.RMSNorm(a.q_rank, eps=1e-6)
            self.q_b = Linear(a.q_rank, query)
        self.kv_norm = nn.RMSNorm(a.kv_rank, eps=1e-6)
        self.kv_b = Linear(a.kv_rank, a.heads * (a.nope_dim + a.v_dim))
        self.o = Linear(a.heads * a.v_dim, config.hidden)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        latents, expand = self._compress(x, context.deferred)
        if context.cache is not None:
            return self._generate(latents, expand, context, context.cache)
        # One exchange: what is sent and multiplied block by block costs a message a block.
        q, kv, key = self.sequence.gather_linear(latents, (expand, self.kv_b), context.deferred)
        q, key = self._rotate(q, key, context)
        out = self.core(q, *self._expand(kv, key), context.documents)
        return self.sequence.linear_scatter(out.transpose(1, 2).flatten(2), self.o, context.deferred)

    def _compress(self, x: Tensor, deferred: Deferred) -> tuple[tuple[Tensor, Tensor, Tensor], Linear]:
        """Normed q latent [B, S, q_rank] or ``x``, normed kv latent [B, S, kv_rank], key [B, S, rope]; and what widens
        the first to queries.
        """
        a = self.sizes
        assert a.kv_rank is not None
        if a.q_rank is None:
            latent, key = self.kv_a(x, deferred).split((a.kv_rank, a.rope_dim), dim=-1)
            return (x, self.kv_norm(latent), key), self.q
        q_latent, latent, key = self.q_kv_a(x, deferred).split((a.q_rank, a.kv_rank, a.rope_dim), dim=-1)
        return (self.q_norm(q_latent), self.kv_norm(latent), key), self.q_b

    def _rotate(self, q: Tensor, key: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Queries [B, S, heads * D] -> [B, heads, S, D], scaled and rotated; the rotary key [B, S, rope], rotated."""
        a = self.sizes
        q = self._heads(q * self.scale, a.width)
        q_nope, q_rope = q.split((a.nope_dim, a.rope_dim), dim=-1)
        q = torch.cat((q_nope, rotate(q_rope, context.cos, context.sin)), dim=-1)
        return q, rotate(key, context.cos, context.sin)

    def _expand(self, kv: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [B, heads, S, D] and values [B, heads, S, V] of widened latents [B, S, heads * (nope + v)]."""
        a = self.sizes
        k, v = self._heads(kv, a.nope_dim + a.v_dim).split((a.nope_dim, a.v_dim), dim=-1)
        return torch.cat((k, key[:, None].expand(-1, k.shape[1], -1, -1)), dim=-1), v.contiguous()

    @staticmethod
    def _heads(x: Tensor, width: int) -> Tensor:
        """[B, S, heads * width] -> [B, heads, S, width]."""
        return x.unflatten(-1, (-1, width)).transpose(1, 2)

    def _generate(
        self, latents: tuple[Tensor, Tensor, Tensor], expand: Linear, context: Context, cache: Cache
    ) -> Tensor:
        """The last S of all cached tokens attend to everything before them."""
        q, latent, key = self.sequence.gather_linear(latents, (expand,), None)
        q, key = self._rotate(q, key, context)
        latent, key = cache.extend(self.layer, latent, key)
        k, v = self._expand(self.kv_b(latent), key)
        return self.o(attend_last(q, k, v).transpose(1, 2).flatten(2))


def attend_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, heads, S, D] of the last S tokens, k and v of all -> [B, heads, S, V]."""
    scores = matmul(q, k.mT)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    scores = scores.masked_fill(future.triu(1 + scores.shape[-1] - scores.shape[-2]), float("-inf"))
    return matmul(scores.softmax(-1), v)


class GroupedQueryAttention(nn.Module):
    """GQA, with the same seams. Its weight is [kv_heads, G D + D + V, H], with G = heads / kv_heads, D = nope + rope,
    V = v_dim: whoever cuts it by heads of keys and values gets the queries that read them as well.
    """

    def __init__(self, config: ModelConfig, layer: int, core: Core = attend) -> None:
        super().__init__()
        a = config.attention
        assert a.kv_heads is not None
        self.layer, self.core, self.sizes = layer, core, a
        self.sequence: Sequence = WholeSequence()
        self.scale = softmax_scale(config.rope, a)
        self.widths = a.heads // a.kv_heads * a.width, a.width, a.v_dim
        self.qkv = Linear(config.hidden, a.kv_heads, sum(self.widths))
        self.bias = nn.Parameter(torch.empty(a.kv_heads, sum(self.widths))) if a.bias else None
        self.q_norm = nn.RMSNorm(a.width, eps=config.norm_eps) if a.qk_norm else None
        self.k_norm = nn.RMSNorm(a.width, eps=config.norm_eps) if a.qk_norm else None
        self.o = Linear(a.heads * a.v_dim, config.hidden)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        (qkv,) = self.sequence.gather_linear((x,), (self.qkv,), context.deferred)
        q, k, v = self._split(qkv, context)
        if context.cache is not None:
            return self.o(self._generate(q, k, v, context.cache).transpose(1, 2).flatten(2))
        out = self.core(q, k, v, context.documents)
        return self.sequence.linear_scatter(out.transpose(1, 2).flatten(2), self.o, context.deferred)

    def _split(self, qkv: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, kv_heads * (G D + D + V)] -> q [B, heads, S, D], k [B, kv_heads, S, D], v [B, kv_heads, S, V]."""
        qkv = qkv.unflatten(-1, (-1, sum(self.widths)))
        if self.bias is not None:
            qkv = qkv + self.bias
        q, k, v = qkv.split(self.widths, dim=-1)
        q = q.unflatten(-1, (-1, self.sizes.width)).flatten(2, 3)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (self._rotate(part.transpose(1, 2), context) for part in (q * self.scale, k))
        return q, k, v.transpose(1, 2).contiguous()

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        """[B, heads, S, D], of each head the first ``rope`` numbers turned."""
        turned, rest = x.split((self.sizes.rope_dim, self.sizes.nope_dim), dim=-1)
        return torch.cat((rotate(turned, context.cos, context.sin), rest), dim=-1)

    def _generate(self, q: Tensor, k: Tensor, v: Tensor, cache: Cache) -> Tensor:
        """The last S of all cached tokens attend to everything before them."""
        k, v = cache.extend(self.layer, k.transpose(1, 2), v.transpose(1, 2))
        times = q.shape[1] // k.shape[2]
        k, v = (part.transpose(1, 2).repeat_interleave(times, dim=1) for part in (k, v))
        return attend_last(q, k, v)


ATTENTION: dict[AttentionKind, type[LatentAttention | GroupedQueryAttention]] = {
    AttentionKind.mla: LatentAttention,
    AttentionKind.gqa: GroupedQueryAttention,
}
