"""Sums and copies of a buffer that is cut into one piece a rank, of any sizes, without a second buffer of its size.

    reduce    | own | other | other |  each rank has summands for all   ->   each has the sum of its own piece
    gather    | own |  ...  |  ...  |  each rank has its own piece      ->   each has all

Sums are taken in the dtype of the buffer. Where ``sums_itself`` says so (parallel/mesh.py), pieces go straight to their
owners, who add in rank order, so that how a buffer is cut into buckets cannot show in the bits. Elsewhere the backend's
own collectives know the wires best: of torch, those that take a list of tensors, because pieces differ in size.

Both calls launch and return at once; what they return completes them. On a group of one rank nothing is sent.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.doing import Doing
from parallel.mesh import sums_itself

Finish = Callable[[], None]


def reduce_pieces(buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> Finish:
    """Puts the sum over the ranks of ``group`` of ``buffer``'s own piece into that piece; the others stay as they are.

    ``buffer`` is flat and contiguous, and nobody writes to it before the call that completes it has returned.
    """
    if len(pieces) == 1:
        return _nothing
    start = _add_in_rank_order if sums_itself(group) else _reduce_scatter
    return start(buffer, pieces, group)


def gather_pieces(buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> Finish:
    """Fills the pieces of the other ranks of ``group`` with what they have there. Otherwise like ``reduce_pieces``."""
    if len(pieces) == 1:
        return _nothing
    start = _copy_to_all if sums_itself(group) else _all_gather
    return start(buffer, pieces, group)


def _exchange(sent: Sequence[Tensor], received: Sequence[Tensor], group: dist.ProcessGroup) -> list[dist.Work]:
    """Sends each other rank its tensor and receives one from it; empty ones, and those of this rank, are not sent."""
    own = dist.get_rank(group)
    others = [rank for rank in range(len(sent)) if rank != own]
    # All receives first: then no send waits for its receiver.
    calls = [dist.P2POp(dist.irecv, received[rank], group=group, group_peer=rank) for rank in others]
    calls += [dist.P2POp(dist.isend, sent[rank], group=group, group_peer=rank) for rank in others]
    calls = [call for call in calls if call.tensor.numel()]
    return dist.batch_isend_irecv(calls) if calls else []


def _add_in_rank_order(buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> Finish:
    parts = [buffer[piece.start : piece.stop] for piece in pieces]
    place = dist.get_rank(group)
    own = parts[place]
    received = [torch.empty_like(own) if rank != place else own for rank in range(len(parts))]
    works = _exchange(parts, received, group)

    def finish() -> None:
        with Doing(waiting=True):
            for work in works:
                work.wait()
        total = received[0]
        for summand in received[1:]:
            # In place, and the sum ends up in the first summand, which is the own piece on rank 0 alone.
            total.add_(summand)
        if total is not own:
            own.copy_(total)

    return finish


def _copy_to_all(buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> Finish:
    parts = [buffer[piece.start : piece.stop] for piece in pieces]
    own = parts[dist.get_rank(group)]
    return _wait_for(_exchange([own] * len(parts), parts, group))


def _reduce_scatter(buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> Finish:
    parts = [buffer[piece.start : piece.stop] for piece in pieces]
    return _wait_for([dist.reduce_scatter(parts[dist.get_rank(group)], parts, group=group, async_op=True)])


def _all_gather(buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> Finish:
    parts = [buffer[piece.start : piece.stop] for piece in pieces]
    return _wait_for([dist.all_gather(parts, parts[dist.get_rank(group)], group=group, async_op=True)])


def _wait_for(works: Sequence[dist.Work]) -> Finish:
    def finish() -> None:
        with Doing(waiting=True):
            for work in works:
                work.wait()

    return finish


def _nothing() -> None:
    pass
