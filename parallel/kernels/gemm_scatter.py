"""Matrix product and reduce-scatter in one: a tile goes to the rank whose rows it holds as soon as it is computed.

Each rank has a slice of K and so a part of every sum, x [n, rows, K] times weight^T [K, N]. Rank r owns the rows x[r]:

    rank s, product    tiles of rank s+1, s+2, ... and its own last --- store ---> slots[s] of the owner
                                                                 then add to ---> arrived[s, chunk] of the owner
    rank r, sum        waits for arrived[s, chunk], s = 0, 1 ... and adds slots[0] + slots[1] + ... in this order

A flag counts the elements of its chunk that have been written, and is complete at (rows of the chunk) x N, whatever
the tiles were. Slots have the dtype of x: a part of a sum is rounded once, the sum is made in float32 and rounded once
more, always in the order of ranks, so that results do not depend on timing. Sums are a kernel of their own, after the
product on the same stream: a rank that waits has sent all that others wait for, so that nobody waits in a circle.

Shapes: n ranks, rows that each owns, K depth of this rank's slice, N columns, chunks of the rows.
Source: Flux, arXiv 2406.06858; Triton-distributed, arXiv 2504.19442.
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.flags import Launch, find, find_flags, raise_flag, wait_for
from parallel.kernels.tile import Tile, multiply


class _Memory(NamedTuple):
    x: Tensor
    weight: Tensor
    slots: Tensor  # table
    arrived: Tensor  # table


class _Sums(NamedTuple):
    slots: Tensor
    arrived: Tensor
    out: Tensor


class _Size(NamedTuple):
    ranks: int
    rows: int
    chunk: int
    columns: int
    depth: int


@triton.jit(do_not_specialize=["rank"])
def _matmul_scatter(memory, size, rank, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    down, across = tl.cdiv(size.chunk, tile.rows), tl.cdiv(size.columns, tile.columns)
    chunks = tl.cdiv(size.rows, size.chunk)
    kind: tl.constexpr = memory.x.dtype.element_ty
    for t in range(tl.program_id(0), size.ranks * chunks * down * across, tl.num_programs(0)):
        step = t // (down * across)
        owner, chunk = (rank + 1 + step // chunks) % size.ranks, step % chunks
        row = chunk * size.chunk + t % down * tile.rows
        end = tl.minimum((chunk + 1) * size.chunk, size.rows)
        if row < end:
            column = t // down % across * tile.columns
            rows, columns = row + tl.arange(0, tile.rows), column + tl.arange(0, tile.columns)
            x = memory.x + owner.to(tl.int64) * size.rows * size.depth
            exist, real = tl.minimum(rows, end - 1), tl.minimum(columns, size.columns - 1)
            total = multiply(x, memory.weight, exist, real, size.depth, tile)
            slot = find(memory.slots, owner, kind) + tl.cast(rank, tl.int64) * size.rows * size.columns
            places = slot + rows[:, None] * size.columns + columns[None, :]
            inside = (rows < end)[:, None] & (columns < size.columns)[None, :]
            tl.store(places, total.to(kind), mask=inside)
            written = tl.minimum(end - row, tile.rows) * tl.minimum(size.columns - column, tile.columns)
            raise_flag(find_flags(memory.arrived, owner) + rank * chunks + chunk, written)


@triton.jit
def _sum_slots(memory, size, block: tl.constexpr):  # type: ignore[no-untyped-def]
    down, across = tl.cdiv(size.chunk, block.rows), tl.cdiv(size.columns, block.columns)
    chunks = tl.cdiv(size.rows, size.chunk)
    for t in range(tl.program_id(0), chunks * down * across, tl.num_programs(0)):
        chunk = t // (down * across)
        row = chunk * size.chunk + t % down * block.rows
        end = tl.minimum((chunk + 1) * size.chunk, size.rows)
        if row < end:
            rows = row + tl.arange(0, block.rows)
            columns = t // down % across * block.columns + tl.arange(0, block.columns)
            places = rows[:, None] * size.columns + columns[None, :]
            inside = (rows < end)[:, None] & (columns < size.columns)[None, :]
            total = tl.full((block.rows, block.columns), 0, tl.float32)
            for source in range(size.ranks):
                complete = (end - chunk * size.chunk) * size.columns
                wait_for(memory.arrived + source * chunks + chunk, complete)
                slot = memory.slots + tl.cast(source, tl.int64) * size.rows * size.columns
                total += tl.load(slot + places, mask=inside, other=0.0).to(tl.float32)
            tl.store(memory.out + places, total.to(memory.out.dtype.element_ty), mask=inside)


class Tables(NamedTuple):
    """Addresses of what each rank owns, int64 [n], and the shape of every rank's flags."""

    slots: Tensor  # of buffers [n, rows, N] in the dtype of x
    arrived: Tensor  # of flags [n, chunks] int32
    chunks: int


def matmul_scatter(
    x: Tensor, weight: Tensor, tables: Tables, rank: int, programs: int, tile: Tile | None = None
) -> None:
    """This rank's part of every sum, ``x`` [n, rows, K] times ``weight`` [N, K] transposed, into the owners' slots.

    Contiguous, one dtype. ``programs`` is the size of the grid. ``sum_slots`` on the owners makes the sums.
    """
    tile = tile or Tile()
    (ranks, rows, depth), (columns, k) = x.shape, weight.shape
    chunk = triton.cdiv(rows, tables.chunks)
    assert depth == k and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()
    assert triton.cdiv(rows, chunk) == tables.chunks, "chunks are uneven"
    assert tables.slots.shape == tables.arrived.shape == (ranks,) and 0 <= rank < ranks and programs > 0
    assert max(rows * depth, rows * columns, weight.numel()) < 2**31  # a flag counts up to chunk * columns
    _matmul_scatter[(programs,)](
        _Memory(x, weight, tables.slots, tables.arrived),
        _Size(ranks, rows, chunk, columns, depth),
        rank,
        tile,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def sum_slots(slots: Tensor, arrived: Tensor, programs: int, launch: Launch | None = None) -> Tensor:
    """``slots`` [n, rows, N] -> [rows, N], their sum in the order of ranks, as flags ``arrived`` [n, chunks] rise."""
    launch = launch or Launch()
    ranks, rows, columns = slots.shape
    chunk = triton.cdiv(rows, arrived.shape[1])
    assert arrived.dtype == torch.int32 and arrived.shape == (ranks, triton.cdiv(rows, chunk)), "chunks are uneven"
    assert slots.is_contiguous() and arrived.is_contiguous() and programs > 0 and rows * columns < 2**31
    out = slots.new_empty(rows, columns)
    _sum_slots[(programs,)](
        _Sums(slots, arrived, out),
        _Size(ranks, rows, chunk, columns, 0),
        launch,
        num_warps=launch.warps,
        enable_fp_fusion=True,
    )
    return out


def reference(parts: Sequence[Tensor], weights: Sequence[Tensor], rank: int) -> Tensor:
    """What ``rank`` ends with, from every rank's x [n, rows, K] and weight [N, K], in plain torch -> [rows, N]."""
    total = torch.zeros(())
    for x, weight in zip(parts, weights, strict=True):
        total = total + (x[rank].float() @ weight.float().t()).to(x.dtype).float()
    return total.to(parts[0].dtype)
