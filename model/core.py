"""The attention core: softmax(q k^T) v under a causal mask, optionally within documents only.

Queries go in blocks; block i sees keys 0 .. end of block i, so half of the square is never computed:

    keys    0 ......... S
    block 0 [##\\      ]        # full product     \\ masked triangle
    block 1 [####\\    ]
    block 2 [######\\  ]

Heads of keys and values may be fewer than those of queries: each is then read by heads / kv_heads of them, neighbours.

Shapes: q [B, heads, S, D], k [B, kv_heads, S, D], v [B, kv_heads, S, V], documents [B, S] or None, result
[B, heads, S, V]. The softmax scale is already in q. This is a seam: whatever has the shape of ``Core`` may take its
place.
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model.operator import operator, register_fake
from model.product import add_product, matmul, matmul_into

BLOCK = 128  # query rows: 64, 128 and 256 were timed on a CPU, docs/speed.md
KEEP_LENGTH = 2048  # up to this length the probabilities are kept for the backward: S^2/2 elements a head


class Core(Protocol):
    """q [B, heads, S, D], k [B, kv_heads, S, D], v [B, kv_heads, S, V], documents [B, S] or None -> [B, heads, S, V],
    causal.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor: ...


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def _probabilities(q: Tensor, k: Tensor, documents: Tensor | None, start: int, out: Tensor) -> None:
    """Softmax of the scores of the block from row ``start``, written to ``out`` [B * heads, rows, end]."""
    end = out.shape[2]
    scores = matmul(q[:, start:end], k[:, :end].transpose(1, 2))
    # Adding -inf above the diagonal takes a third of the time of filling it in through a mask.
    scores[:, :, start:] += torch.full((end - start, end - start), float("-inf"), dtype=q.dtype, device=q.device).triu_(
        1
    )
    if documents is not None:
        other = documents[:, start:end, None] != documents[:, None, :end]
        scores.view(len(documents), -1, *scores.shape[1:]).masked_fill_(other[:, None], float("-inf"))
    torch.softmax(scores, dim=-1, out=out)


@operator("shoestring::attention")
def _forward(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and the probabilities of all blocks one after another (empty above KEEP_LENGTH)."""
    shape, length = (*q.shape[:3], v.shape[3]), q.shape[2]
    q, k, v = q.flatten(0, 1), _repeat(k, q), _repeat(v, q)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    kept = q.new_empty(_kept_size(len(q), length))
    for (start, end), p in zip(_blocks(length), _split(kept, q), strict=True):
        _probabilities(q, k, documents, start, out=p)
        matmul_into(out[:, start:end], p, v[:, :end])
    return out.view(shape), kept


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, kv_heads, S, *] as often as heads of q [B, heads, S, D] read them: [B * heads, S, *]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).flatten(0, 1)


def _kept_size(batch: int, length: int) -> int:
    return 0 if length > KEEP_LENGTH else batch * sum((end - start) * end for start, end in _blocks(length))


def _split(kept: Tensor, q: Tensor) -> list[Tensor]:
    """The probabilities [B * heads, rows, end] of every block: parts of ``kept``, or one scratch for all."""
    shapes = [(len(q), end - start, end) for start, end in _blocks(q.shape[1])]
    if len(kept):
        return [
            part.view(shape) for part, shape in zip(kept.split([math.prod(s) for s in shapes]), shapes, strict=True)
        ]
    scratch = q.new_empty(max(math.prod(shape) for shape in shapes))
    return [scratch[: math.prod(shape)].view(shape) for shape in shapes]


@register_fake(_forward)
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(_kept_size(q.shape[0] * q.shape[1], q.shape[2]))


@operator("shoestring::attention_backward")
def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    shapes, k, v = (q.shape, k.shape, v.shape), _repeat(k, q), _repeat(v, q)
    g, q = g.flatten(0, 1), q.flatten(0, 1)
    gq, gk, gv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for (start, end), p in zip(_blocks(q.shape[1]), _split(kept, q), strict=True):
        if not len(kept):
            _probabilities(q, k, documents, start, out=p)
        gp = matmul(g[:, start:end], v[:, :end].transpose(1, 2))
        gs = torch._softmax_backward_data(gp, p, -1, p.dtype)
        matmul_into(gq[:, start:end], gs, k[:, :end])
        add_product(gk[:, :end], gs.transpose(1, 2), q[:, start:end])
        add_product(gv[:, :end], p.transpose(1, 2), g[:, start:end])
    return gq.view(shapes[0]), _total(gk, shapes[1]), _total(gv, shapes[2])


def _total(gradient: Tensor, shape: torch.Size) -> Tensor:
    """[B * heads, S, *] -> [B, kv_heads, S, *]: the sum over the heads that read it."""
    gradient = gradient.view(*shape[:2], -1, *shape[2:])
    return gradient.sum(2) if gradient.shape[2] > 1 else gradient.view(shape)


@register_fake(_backward)
def _(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class BlockedAttention(torch.autograd.Function):
    """The blocked core; the softmax and both of its neighbours in one backward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        out, kept = _forward(q, k, v, documents)
        ctx.save_for_backward(q, k, v, documents, kept)
        return out

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        q, k, v, documents, kept = ctx.saved_tensors
        return *_backward(g.contiguous(), q, k, v, documents, kept), None


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """The core on a CPU, where fused kernels refuse values narrower than keys."""
    return BlockedAttention.apply(q, k, v, documents)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """The core on a GPU: torch's scaled_dot_product_attention picks the kernel."""
    grouped = q.shape[1] != k.shape[1]
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=grouped)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same.tril(), scale=1.0, enable_gqa=grouped)


CORES: dict[str, Core] = {"cpu": blocked_attention}


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    """The default core: one row per device type, torch's fused attention where there is none."""
    return CORES.get(q.device.type, fused_attention)(q, k, v, documents)
