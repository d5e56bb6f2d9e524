"""Cross entropy through the output head without ever holding the full logits.

    loss = sum over counted t of  logsumexp_v(h_t W^T) - (h_t W^T)[label_t]

Tokens go in chunks of at most ``CHUNK`` logits. The backward computes a chunk's logits again, turns them into
softmax - onehot in place and multiplies that both ways, so that peak memory is one chunk's logits.
Shapes: hidden [T, H], weight [V, H], labels and counted [T]. Logits and sums are at least float32.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from model.product import matmul

CHUNK = 2**25  # logits held at once: 128 MiB in float32


def widen(dtype: torch.dtype) -> torch.dtype:
    """What logits and sums are computed in."""
    return torch.promote_types(dtype, torch.float32)


def split_chunks(tokens: int, vocab: int) -> list[tuple[int, int]]:
    """Ranges of tokens with at most ``CHUNK`` logits each."""
    size = max(1, CHUNK // vocab)
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


class Targets(NamedTuple):
    """What the gradient of a token's loss depends on besides its logits."""

    labels: Tensor  # [T] int64, rows of the weight
    held: Tensor  # [T] bool, whether the label is among these rows at all
    scale: Tensor  # [T], the gradient of the token's loss


def differentiate(hidden: Tensor, weight: Tensor, targets: Targets, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of hidden [T, H] and weight [V, H]; ``normaliser`` [T] is the logarithm of the sum of all exps."""
    g_hidden = torch.empty_like(hidden)
    g_weight = torch.zeros_like(weight, dtype=widen(weight.dtype))
    for start, end in split_chunks(len(hidden), len(weight)):
        labels, held, scale = (part[start:end, None] for part in targets)
        p = (matmul(hidden[start:end], weight.t()).to(normaliser.dtype) - normaliser[start:end, None]).exp()
        p = p.scatter_add(-1, labels, -held.to(p.dtype))
        p = (p * scale).to(hidden.dtype)
        g_hidden[start:end] = matmul(p, weight)
        g_weight += matmul(p.t(), hidden[start:end])
    return g_hidden, g_weight.to(weight.dtype)


class CrossEntropyFunction(torch.autograd.Function):
    """Sum over counted tokens, and its gradients."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        wide = widen(hidden.dtype)
        normaliser = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start, end in split_chunks(len(hidden), len(weight)):
            logits = matmul(hidden[start:end], weight.t()).to(wide)
            normaliser[start:end] = logits.logsumexp(-1)
            losses = normaliser[start:end] - logits.gather(-1, labels[start:end, None])[:, 0]
            total += (losses * counted[start:end]).sum()
        ctx.save_for_backward(hidden, weight, labels, counted, normaliser)
        return total

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        hidden, weight, labels, counted, normaliser = ctx.saved_tensors
        held = torch.ones_like(counted)
        return *differentiate(hidden, weight, Targets(labels, held, counted * g), normaliser), None, None


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """hidden [..., H], weight [V, H], labels [...] int64, counted [...] bool -> scalar sum in nats."""
    return CrossEntropyFunction.apply(hidden.flatten(0, -2), weight, labels.flatten(), counted.flatten())


class CrossEntropy(Protocol):
    """The seam behind which a head may be split by its vocabulary: the shapes of ``cross_entropy``."""

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor: ...
