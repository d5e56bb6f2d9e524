"""One micro-batch of packed text, what its loss is divided by, and what comes out of a forward.

    ids        t0 t1 t2 ... t(S-1) | tS ... t(S+D)     S inputs, then 1 + D tokens that are only ever labels
    inputs     t0 ......... t(S-1)
    labels 0      t1 .......... tS                     next token
    labels d         t(1+d) ........ t(S+d)            depth d of multi-token prediction

A sequence carries its labels with it, so every depth reads the same whole sequence: nothing is rolled, and nothing is
lost at the right edge.

Shapes: B sequences, S inputs a sequence, D depth of multi-token prediction, E routed experts.
"""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch.

    ``counted`` is about a token as a label: False for padding, for a sequence's first token (nothing before it
    predicts it) and, where documents are masked, for a document's first token.
    """

    ids: Tensor  # [B, S + 1 + D] int64
    counted: Tensor  # [B, S + 1 + D] bool: predicting ids[b, i] counts in the loss
    documents: Tensor | None  # [B, S] int32: tokens attend within their own number only. None: no masking


class Denominators(NamedTuple):
    """What the sums of the whole global batch are divided by."""

    tokens: tuple[float, ...]  # [1 + D] counted labels at each depth
    sequences: float  # of the auxiliary loss


class Losses(NamedTuple):
    """What a forward gives back."""

    total: Tensor  # scalar, divided by the denominators and weighted: the one to call backward() on
    sums: Tensor  # [1 + D] detached: sums of cross entropy in nats over counted labels, float32 or wider
    aux: Tensor  # detached scalar: auxiliary loss summed over sequences and layers, before its weight
    load: Tensor  # [MoE layers (+ D), E] int64: tokens each expert received; zero for layers of other stages
    hidden: Tensor | None = None  # [B, S, H] for the next pipeline stage; the last has none


def slice_labels(batch: Batch, depth: int, d: int) -> tuple[Tensor, Tensor]:
    """The labels of depth ``d`` in 0..``depth``: ids [B, S] int64 and whether each counts [B, S] bool."""
    length = batch.ids.shape[1] - 1 - depth
    return batch.ids[:, 1 + d : 1 + d + length], batch.counted[:, 1 + d : 1 + d + length]


def count_labels(batch: Batch, depth: int) -> list[int]:
    """Counted labels at each depth 0..``depth``: what ``Denominators.tokens`` sums up over a global batch."""
    return [int(slice_labels(batch, depth, d)[1].sum()) for d in range(depth + 1)]
