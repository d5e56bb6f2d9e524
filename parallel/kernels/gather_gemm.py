"""All-gather and matrix product in one: a tile starts when the chunk that it reads has arrived.

y = gathered times weight^T, where gathered holds the shards of all ranks, and all but this rank's own are on their way:

    gathered [n, rows, K]      rank 2 of 4:   | 2 | 3: a b | 0: a b | 1: a b |   tiles in this order
                                                ^     ^ flag set: its tiles run
    arrived  [n, chunks]                      here already; no flag is asked

The program of a tile waits on the flag of the tile's chunk (``parallel.kernels.flags``) and for nothing else. Chunks
are copied in the order in which their tiles are computed, own first and then round the ring, so that no two ranks start
by reading from the same peer. What arrives is kept: the gathered buffer is what the weight gradient multiplies.

The grid is bounded: ``programs`` of them stay on the device, and each takes every ``programs``-th tile. With a program
for every tile, those that wait could fill the device, and where a copy needs a multiprocessor too (the kernel that sets
the flag does) it would never get one: both would wait for ever. Leave it some, as ``parallel.kernels.peers`` does.

Shapes: n ranks, rows of a shard, K depth, N columns, chunks = ceil(rows / chunk).
Source: Flux, arXiv 2406.06858; Triton-distributed, arXiv 2504.19442.
Never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.flags import wait_for
from parallel.kernels.tile import Tile, multiply


class _Memory(NamedTuple):
    gathered: Tensor
    weight: Tensor
    out: Tensor
    arrived: Tensor


class _Size(NamedTuple):
    ranks: int
    rows: int
    chunk: int
    columns: int
    depth: int


@triton.jit(do_not_specialize=["rank"])
def _gather_matmul(memory, size, rank, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    down, across = tl.cdiv(size.chunk, tile.rows), tl.cdiv(size.columns, tile.columns)
    chunks = tl.cdiv(size.rows, size.chunk)
    for t in range(tl.program_id(0), size.ranks * chunks * down * across, tl.num_programs(0)):
        step = t // (down * across)
        source, chunk = (rank + step // chunks) % size.ranks, step % chunks
        row = chunk * size.chunk + t % down * tile.rows
        end = tl.minimum((chunk + 1) * size.chunk, size.rows)
        if row < end:
            if source != rank:
                wait_for(memory.arrived + source * chunks + chunk, 1)
            rows = row + tl.arange(0, tile.rows)
            columns = t // down % across * tile.columns + tl.arange(0, tile.columns)
            first = source.to(tl.int64) * size.rows
            x = memory.gathered + first * size.depth
            exist, real = tl.minimum(rows, end - 1), tl.minimum(columns, size.columns - 1)
            total = multiply(x, memory.weight, exist, real, size.depth, tile)
            places = memory.out + first * size.columns + rows[:, None] * size.columns + columns[None, :]
            inside = (rows < end)[:, None] & (columns < size.columns)[None, :]
            tl.store(places, total.to(memory.out.dtype.element_ty), mask=inside)


def gather_matmul(
    gathered: Tensor, arrived: Tensor, weight: Tensor, rank: int, programs: int, tile: Tile | None = None
) -> Tensor:
    """``gathered`` [n, rows, K] times ``weight`` [N, K] transposed -> [n, rows, N], as chunks arrive.

    ``arrived`` [n, chunks] int32 is 1 where a chunk of rows / chunks rows, rounded up, is there; row ``rank`` is not
    read. All are contiguous; one dtype, accumulated in float32. ``programs`` is the size of the grid.
    """
    tile = tile or Tile()
    (ranks, rows, depth), (columns, k) = gathered.shape, weight.shape
    chunk = triton.cdiv(rows, arrived.shape[1])
    assert depth == k and gathered.dtype == weight.dtype and 0 <= rank < ranks and programs > 0
    assert arrived.dtype == torch.int32 and arrived.shape == (ranks, triton.cdiv(rows, chunk)), "chunks are uneven"
    assert gathered.is_contiguous() and arrived.is_contiguous() and weight.is_contiguous()
    assert max(rows * depth, rows * columns, weight.numel()) < 2**31
    out = gathered.new_empty(ranks, rows, columns)
    size = _Size(ranks, rows, chunk, columns, depth)
    _gather_matmul[(programs,)](
        _Memory(gathered, weight, out, arrived),
        size,
        rank,
        tile,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out


def reference(gathered: Tensor, weight: Tensor) -> Tensor:
    """What ``gather_matmul`` gives once everything has arrived, in plain torch."""
    return (gathered.float() @ weight.float().t()).to(gathered.dtype)
