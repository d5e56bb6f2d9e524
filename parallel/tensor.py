"""Tensor and sequence parallelism: heads, widths and vocabulary split over tp, everything between on sequence shards.

    shard [B, S/n, *] -- gather --> [B, S, *] -- columns of W, then rows of W' --> partial sums -- scatter --> shard

The gradient of a gather is a scatter (each rank saw the whole through its own columns: a partial gradient), and that of
a scatter is a gather (Megatron's g and g-bar, arXiv 2205.05198, section 4.2.2). What runs on shards has whole weights
and partial gradients, which the engine sums over tp as it does over dp.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from model.embedding import look_up
from model.recompute import COMMUNICATION
from model.sequence import Sequence
from parallel.collectives import all_gather, all_reduce, sum_scatter


def _find(group: str) -> dist.ProcessGroup:
    # Operators take no groups, only names.
    return _resolve_process_group(GroupName(group))


@torch.library.custom_op(f"{COMMUNICATION}::gather", mutates_args=())
def _gather(shards: list[Tensor], group: str) -> list[Tensor]:
    """Each [B, s, *] -> [B, n s, *], in one all-gather."""
    sizes = [shard.numel() for shard in shards]
    joined = shards[0].flatten() if len(shards) == 1 else torch.cat([shard.flatten() for shard in shards])
    parts = all_gather(joined, _find(group)).wait().split(sizes, dim=1)  # [n, B s *] each
    wholes = [
        part.unflatten(1, shard.shape).transpose(0, 1).flatten(1, 2) for part, shard in zip(parts, shards, strict=True)
    ]
    return [whole.contiguous() for whole in wholes]


@_gather.register_fake
def _(shards: list[Tensor], group: str) -> list[Tensor]:
    n = _find(group).size()
    return [shard.new_empty(shard.shape[0], n * shard.shape[1], *shard.shape[2:]) for shard in shards]


@torch.library.custom_op(f"{COMMUNICATION}::scatter", mutates_args=())
def _scatter(partials: list[Tensor], group: str) -> list[Tensor]:
    """Each [B, n s, *] -> the sum over ranks of [B, s, *], in one reduce-scatter."""
    ranks = _find(group)
    parts = [whole.unflatten(1, (ranks.size(), -1)).transpose(0, 1) for whole in partials]  # [n, B, s, *] each
    summed = sum_scatter(torch.cat([part.flatten(1) for part in parts], dim=1), ranks).wait()
    shards = summed.split([part[0].numel() for part in parts])
    return [shard.view(part.shape[1:]).clone() for shard, part in zip(shards, parts, strict=True)]


@_scatter.register_fake
def _(partials: list[Tensor], group: str) -> list[Tensor]:
    n = _find(group).size()
    return [whole.new_empty(whole.shape[0], whole.shape[1] // n, *whole.shape[2:]) for whole in partials]


@torch.library.custom_op(f"{COMMUNICATION}::total", mutates_args=())
def _total(counts: Tensor, group: str) -> Tensor:
    return all_reduce(counts, _find(group)).wait()


@_total.register_fake
def _(counts: Tensor, group: str) -> Tensor:
    return torch.empty_like(counts)


class Gather(torch.autograd.Function):
    """Shards to wholes; gradients of wholes, partial on every rank, to sums of shards."""

    @staticmethod
    def forward(ctx, group: str, *shards: Tensor):  # type: ignore[no-untyped-def]
        ctx.group = group
        return tuple(_gather(list(shards), group))

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[no-untyped-def]
        return None, *_scatter(list(gradients), ctx.group)


class Scatter(torch.autograd.Function):
    """Partial wholes to shards of their sum; gradients of shards to wholes."""

    @staticmethod
    def forward(ctx, group: str, partial: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _scatter([partial], group)[0]

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return None, _gather([g], ctx.group)[0]


class ShardedSequence:
    """Every sequence is cut into one shard a rank of ``group``: see ``model.sequence.Sequence``."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.degree, self.place, self._name = group.size(), group.rank(), group.group_name

    def gather(self, *shards: Tensor) -> tuple[Tensor, ...]:
        return tuple(Gather.apply(self._name, *shards))

    def scatter(self, partial: Tensor) -> Tensor:
        return Scatter.apply(self._name, partial)

    def total(self, counts: Tensor) -> Tensor:
        return _total(counts, self._name)


class VocabularyLookup:
    """``model.embedding.Lookup`` in the rows of a table from ``first`` on: other tokens are zero, and ranks add up."""

    def __init__(self, first: int, sequence: Sequence) -> None:
        self.first, self.sequence = first, sequence

    def __call__(self, ids: Tensor, weight: Tensor) -> Tensor:
        """ids [B, S] -> this rank's shard [B, S / n, H]."""
        rows = ids - self.first
        mine = (rows >= 0) & (rows < len(weight))
        return self.sequence.scatter(look_up(rows.where(mine, 0), weight) * mine[..., None])
