"""Whole sequences and their shards: the seam behind which tensor and sequence parallelism work.

Between its wide parts a model may hold a shard of every sequence, [B, S / n, ...] instead of [B, S, ...]: norms,
routers, latent projections and the residual stream then work on shards, heads and feed-forward widths on the whole.

    shard -- gather --> whole -- heads or widths of this rank --> partial sums of the whole -- scatter --> shard

Where a product follows a gather or a scatter follows a product the two are one operation, so that whoever splits
sequences may let blocks of one travel while others are multiplied.

On one device a shard is the whole, ``gather``, ``scatter`` and ``total`` do nothing, and what is left are the products.
"""

from typing import Protocol

from torch import Tensor

from model.linear import Deferred, Linear


class Sequence(Protocol):
    """``degree`` ranks hold a shard each."""

    degree: int

    def gather(self, *shards: Tensor) -> tuple[Tensor, ...]:
        """Each [B, S / n, *] -> [B, S, *], in one exchange."""
        ...

    def scatter(self, partial: Tensor) -> Tensor:
        """Partial sums [B, S, H] -> this rank's shard [B, S / n, H] of their sum."""
        ...

    def gather_linear(
        self, shards: tuple[Tensor, ...], linears: tuple[Linear, ...], deferred: Deferred
    ) -> tuple[Tensor, ...]:
        """Each [B, S / n, *] -> [B, S, *], in one exchange; the first ones then go through a linear each."""
        ...

    def linear_scatter(self, x: Tensor, linear: Linear, deferred: Deferred) -> Tensor:
        """[B, S, I] -> this rank's shard [B, S / n, O] of the sum over ranks of ``linear(x)``."""
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

    def gather_linear(
        self, shards: tuple[Tensor, ...], linears: tuple[Linear, ...], deferred: Deferred
    ) -> tuple[Tensor, ...]:
        widened = tuple(linear(x, deferred) for x, linear in zip(shards, linears, strict=False))
        return widened + shards[len(linears) :]

    def linear_scatter(self, x: Tensor, linear: Linear, deferred: Deferred) -> Tensor:
        return linear(x, deferred)

    def total(self, counts: Tensor) -> Tensor:
        return counts
