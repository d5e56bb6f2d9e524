"""Whole sequences and their shards: the seam behind which tensor and sequence parallelism work.

Between its wide parts a model may hold a shard of every sequence, [B, S / n, ...] instead of [B, S, ...]: norms,
routers, latent projections and the residual stream then work on shards, heads and feed-forward widths on the whole.

    shard -- gather --> whole -- heads or widths of this rank --> partial sums of the whole -- scatter --> shard

On one device a shard is the whole and all three operations do nothing.
"""

from typing import Protocol

from torch import Tensor


class Sequence(Protocol):
    """``degree`` ranks hold a shard each."""

    degree: int

    def gather(self, *shards: Tensor) -> tuple[Tensor, ...]:
        """Each [B, S / n, *] -> [B, S, *], in one exchange."""
        ...

    def scatter(self, partial: Tensor) -> Tensor:
        """Partial sums [B, S, H] -> this rank's shard [B, S / n, H] of their sum."""
        ...

    def total(self, counts: Tensor) -> Tensor:
        """Sum of integer counts over the shards."""
        ...


class WholeSequence:
    """One device."""

    degree = 1

    def gather(self, *shards: Tensor) -> tuple[Tensor, ...]:
        return shards

    def scatter(self, partial: Tensor) -> Tensor:
        return partial

    def total(self, counts: Tensor) -> Tensor:
        return counts
