"""Expert dispatch that writes rows straight into the peers' buffers, and the combine that reads rows straight out.

    dispatch   tokens [T, H] of rank s --- row by row, through the table ---> buffer of rank p, from row first[s, p] on
                                                   then add their number ---> arrived[s] of rank p
    experts    rank p waits until arrived[s] is what s sends, for all s; what they make of a row takes its place
    announce   rank p adds 1 to ready[p] of every rank
    combine    rank s waits for ready, reads the rows of each of its tokens where they lie, and sums them -> [T, H]

Nothing is packed before and nothing is unpacked after: ``source`` names the token of a row that leaves, and the row of
rank s for rank p has its place in p's buffer from the counts of all ranks alone (``find_rows``). The layout is that of
``parallel.exchange``: a token goes once to each rank that has experts of its, rows are ordered by rank and then by
token, and what comes back is weighed already, so that combining is a sum. It is made in float32 in the order of ranks.

Each is the other's gradient. The gradient of dispatch sums, for a token, what came back for its rows: ``combine`` over
the buffers that hold the gradients of rows. The gradient of combine gives every row its token's: ``dispatch`` of
the gradients of tokens. Both with the same ``Rows``. Rows of any dtype can be dispatched, so that what travels beside a
token (gates, slots) can be joined to its row as bytes.

A program takes blocks of rows, the peers' first, round the ring from its own rank, and adds to a flag once for a block.
Shapes: n ranks, T tokens of this rank, H their width, S rows that leave this rank, C = S copies of its tokens.
Source: DeepEP (the kernels for NVLink); DeepSeek-V3, arXiv 2412.19437, section 3.2.2.
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.exchange import Copies
from parallel.kernels.flags import Launch, find, find_flags, raise_flag, wait_for


class Rows(NamedTuple):
    """Where the rows of a rank go: all int32 or int64 tensors on its device."""

    source: Tensor  # [S] int64, the token of each row, by rank and then by token
    sent: Tensor  # [n] int32, rows for each rank
    starts: Tensor  # [n] int32, the first of them
    first: Tensor  # [n] int32, where they begin in that rank's buffer
    rank: Tensor  # [C] int32, copy by copy of each token: which rank holds it
    row: Tensor  # [C] int32, and in which row of that rank's buffer
    copies: Tensor  # [T] int64, the first copy of each token


class _There(NamedTuple):
    tokens: Tensor
    buffers: Tensor
    arrived: Tensor


class _Back(NamedTuple):
    buffers: Tensor
    ready: Tensor
    out: Tensor


class _Size(NamedTuple):
    ranks: int
    tokens: int
    copies: int
    width: int


@triton.jit(do_not_specialize=["rank"])
def _dispatch(memory, rows, size, rank, block: tl.constexpr):  # type: ignore[no-untyped-def]
    kind: tl.constexpr = memory.tokens.dtype.element_ty
    programs = tl.num_programs(0)
    done = 0  # blocks for the ranks before
    for step in range(size.ranks):
        there = (rank + 1 + step) % size.ranks
        count, start = tl.load(rows.sent + there), tl.load(rows.starts + there)
        buffer = find(memory.buffers, there, kind) + tl.load(rows.first + there).to(tl.int64) * size.width
        blocks = tl.cdiv(count, block.rows)
        # Blocks are dealt out as if they were one row over all ranks, so that programs have equally many.
        for b in range((tl.program_id(0) + programs - done % programs) % programs, blocks, programs):
            places = b * block.rows + tl.arange(0, block.rows)
            inside = places < count
            tokens = tl.load(rows.source + start + places, mask=inside, other=0)
            for column in range(0, size.width, block.columns):
                columns = column + tl.arange(0, block.columns)
                mask = inside[:, None] & (columns < size.width)[None, :]
                values = tl.load(
                    memory.tokens + tokens[:, None].to(tl.int64) * size.width + columns[None, :], mask=mask
                )
                tl.store(buffer + places[:, None].to(tl.int64) * size.width + columns[None, :], values, mask=mask)
            raise_flag(find_flags(memory.arrived, there) + rank, tl.minimum(count - b * block.rows, block.rows))
        done += blocks


@triton.jit
def _combine(memory, rows, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    kind: tl.constexpr = memory.out.dtype.element_ty
    for rank in range(size.ranks):
        wait_for(memory.ready + rank, 1)
    for token in range(tl.program_id(0), size.tokens, tl.num_programs(0)):
        start = tl.load(rows.copies + token)
        end = tl.load(rows.copies + token + 1, mask=token + 1 < size.tokens, other=size.copies)
        out = memory.out + tl.cast(token, tl.int64) * size.width
        for column in range(0, size.width, block.columns):
            columns = column + tl.arange(0, block.columns)
            inside = columns < size.width
            total = tl.full((block.columns,), 0, tl.float32)
            for copy in range(start, end):
                buffer = find(memory.buffers, tl.load(rows.rank + copy), kind)
                row = buffer + tl.load(rows.row + copy).to(tl.int64) * size.width
                total += tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + columns, total.to(kind), mask=inside)


def find_rows(copies: Copies, counts: Tensor, rank: int) -> Rows:
    """Where the rows of ``copies`` go, when rank s sends ``counts[s, p]`` [n, n] int64 rows to rank p.

    Works on the device and asks nothing back.
    """
    assert counts.ndim == 2 and counts.shape[0] == counts.shape[1] and 0 <= rank < len(counts)
    sent = counts[rank]
    ends, first = sent.cumsum(0), counts.cumsum(0)[rank] - sent
    starts = ends - sent
    there = torch.searchsorted(ends, copies.slots, right=True)  # empty ranks are passed over
    row = first.index_select(0, there) + copies.slots - starts.index_select(0, there)
    return Rows(copies.source, sent.int(), starts.int(), first.int(), there.int(), row.int(), copies.starts)


def dispatch(
    tokens: Tensor, rows: Rows, buffers: Tensor, arrived: Tensor, grid: tuple[int, int], launch: Launch | None = None
) -> None:
    """Copies of ``tokens`` [T, H] into the peers' buffers [R, H], R >= all rows that a rank is sent.

    ``buffers`` [n] int64 are their addresses, ``arrived`` [n] those of their flags [n] int32, of which flag ``rank``
    rises by the rows written. ``grid`` is (rank, programs). T may be 0.
    """
    launch, (rank, programs) = launch or Launch(), grid
    assert tokens.ndim == 2 and tokens.is_contiguous() and buffers.shape == arrived.shape == rows.sent.shape
    assert 0 <= rank < len(buffers) and programs > 0
    size = _Size(len(buffers), len(tokens), len(rows.source), tokens.shape[1])
    memory = _There(tokens, buffers, arrived)
    _dispatch[(programs,)](memory, rows, size, rank, launch, num_warps=launch.warps, enable_fp_fusion=True)


def combine(
    out: Tensor, rows: Rows, buffers: Tensor, ready: Tensor, programs: int, launch: Launch | None = None
) -> Tensor:
    """The sums of the rows of each token, read from the ranks that hold them, into ``out`` [T, H].

    ``buffers`` [n] int64 are the addresses of [R, H] in the dtype of ``out``; ``ready`` [n] int32 are this rank's own
    flags, 1 where a rank's rows may be read. A token without rows gets zeros.
    """
    launch = launch or Launch(columns=1024)
    assert out.ndim == 2 and out.is_contiguous() and len(rows.copies) == len(out)
    assert ready.dtype == torch.int32 and ready.shape == buffers.shape == rows.sent.shape and programs > 0
    size = _Size(len(buffers), len(out), len(rows.rank), out.shape[1])
    memory = _Back(buffers, ready, out)
    _combine[(programs,)](memory, rows, size, launch, num_warps=launch.warps, enable_fp_fusion=True)
    return out


def reference_dispatch(tokens: list[Tensor], copies: list[Copies], counts: Tensor, rank: int) -> Tensor:
    """The rows that ``rank`` is sent by all ranks, by rank and token, in plain torch -> [R, H]."""
    leaving = [t.index_select(0, c.source) for t, c in zip(tokens, copies, strict=True)]
    return torch.cat([rows.split(sent.tolist())[rank] for rows, sent in zip(leaving, counts, strict=True)])


def reference_combine(buffers: list[Tensor], copies: Copies, counts: Tensor, rank: int) -> Tensor:
    """The tokens [T, H] of ``rank``, each the sum of its rows in ``buffers`` [R, H] of all ranks, in plain torch."""
    back = torch.cat([b.split(counts[:, p].tolist())[rank] for p, b in enumerate(buffers)]).float()  # [S, H]
    total = back.new_zeros(len(copies.starts), back.shape[1])
    bounds = [*copies.starts.tolist(), len(copies.slots)]
    for token, (start, end) in enumerate(pairwise(bounds)):
        for slot in copies.slots[start:end].tolist():
            total[token] += back[slot]
    return total.to(buffers[0].dtype)
