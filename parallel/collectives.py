"""Collectives: each starts at once and gives a ``Pending``, whose ``wait`` gives the result. None is autograd's.

Shapes: n ranks in the group; x [...] on each. Results never depend on timing: sums go in the order of ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import posts_itself, sums_itself
from parallel.pending import Pending


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    """x [...] of every rank -> [n, ...]."""
    out = x.new_empty(group.size(), *x.shape)
    # Flat, because gloo wants the dims of both to agree.
    work = dist.all_gather_single(out.view(-1), x.contiguous().view(-1), group, async_op=True)
    return Pending((work,), lambda: out)


def sum_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    """x [n, ...] of every rank -> [...]: the sum over ranks of the part that is this rank's."""
    start = _exchange_and_add if sums_itself(group) else _reduce_scatter
    return start(x.contiguous(), group)


def all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup) -> Pending[Tensor]:
    """The first ``sent[0]`` rows go to rank 0 of the group, the next to rank 1 ... -> rows received, by rank."""
    out, rows = rows.new_empty(sum(received), *rows.shape[1:]), rows.contiguous()
    if posts_itself(group):
        return Pending(_post(rows.split(list(sent)), out.split(list(received)), group), lambda: out)
    work = dist.all_to_all_single(out, rows, list(received), list(sent), group, async_op=True)
    return Pending((work,), lambda: out)


def all_to_all_joined(
    parts: Sequence[Tensor],
    source: Tensor | None,
    sent: Sequence[int],
    received: Sequence[int],
    group: dist.ProcessGroup,
) -> Pending[tuple[Tensor, ...]]:
    """``all_to_all`` of several tensors [T, width], row beside row in one message, because what short rows cost is
    latency. Rows ``source`` [S] are sent, or all of them.
    """
    row = [part.contiguous().view(torch.uint8) for part in parts]
    joined = row[0] if len(row) == 1 else torch.cat(row, 1)
    pending = all_to_all(joined if source is None else joined.index_select(0, source), sent, received, group)

    def cut(rows: Tensor) -> tuple[Tensor, ...]:
        if len(row) == 1:
            return (rows.view(parts[0].dtype),)
        pieces = rows.split([part.shape[1] for part in row], 1)
        # Copies: of a single row a piece is contiguous where it is, at an offset that its dtype may not have.
        apart = [piece.clone(memory_format=torch.contiguous_format) for piece in pieces]
        return tuple(piece.view(part.dtype) for piece, part in zip(apart, parts, strict=True))

    return pending.then(cut)


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending[Tensor]:
    """x [...] of every rank -> its sum or maximum. ``x`` is left alone."""
    out = x.clone()
    return Pending((dist.all_reduce(out, op, group, async_op=True),), lambda: out)


def _post(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> tuple[dist.Work, ...]:
    """Every part to its rank, as messages of their own; this rank's is copied."""
    own, ranks = group.rank(), group.size()
    others = [(own + step) % ranks for step in range(1, ranks)]
    received[own].copy_(sent[own])
    # All receives first: then no send waits for its receiver. What is empty at one end is empty at the other.
    works = [group.recv([received[peer]], peer, 0) for peer in others if received[peer].numel()]
    works += [group.send([sent[peer]], peer, 0) for peer in others if sent[peer].numel()]
    return tuple(works)


def _reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    out = torch.empty_like(x[0])
    work = dist.reduce_scatter_single(out.view(-1), x.view(-1), dist.ReduceOp.SUM, group, async_op=True)
    return Pending((work,), lambda: out)


def _exchange_and_add(x: Tensor, group: dist.ProcessGroup) -> Pending[Tensor]:
    # Narrow dtypes are added in float32 and rounded once, which a reduction on the way could not do.
    out = torch.empty_like(x)
    return Pending((dist.all_to_all_single(out, x, group=group, async_op=True),), lambda: out.sum(0))
