"""The edge to a real machine: buffers that all ranks of a group can address, and one call for each overlapped product.

    allocate     memory of this rank that peers may map: torch's symmetric memory (one node, NVLink or xGMI)
    connect      a rendezvous of the group: every rank's buffer and flags as tensors here, their addresses as tables
    barrier      of all ranks, on the stream: separates one use of the buffers from the next

A use is: barrier, write or read and wait for flags, zero this rank's own flags. So flags are zero when a barrier lets
the next use begin. Where peers read this rank's buffer, another barrier closes the use; then it may be overwritten. A
buffer serves one call at a time, on one stream.

Shapes are as in gather_gemm, gemm_scatter and dispatch beside this file. Source: torch.distributed._symmetric_memory
(a prototype, whose names may change). Never run on a GPU: the calls are checked on buffers in memory that processes
share, ``connect`` with a handle that is made up. docs/kernels.md says more.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from parallel.kernels import dispatch as rows_out
from parallel.kernels.flags import announce, await_flags, mark
from parallel.kernels.gather_gemm import gather_matmul
from parallel.kernels.gemm_scatter import Tables, matmul_scatter, sum_slots
from parallel.kernels.tile import default_tile

RESERVED = 8  # multiprocessors left to copies and to the kernels that raise flags; a guess, as nothing was measured


@dataclass(frozen=True, slots=True)
class Peers:
    """The buffers and flags of a group's ranks, as this rank addresses them."""

    rank: int
    buffers: tuple[Tensor, ...]  # by rank
    flags: tuple[Tensor, ...]  # by rank, int32
    barrier: Callable[[], None]
    programs: int  # grid of the kernels that wait
    stream: torch.cuda.Stream | None = None  # for copies; None on a CPU
    table: Tensor = field(init=False)  # [n] int64, addresses of buffers
    flag_table: Tensor = field(init=False)  # [n] int64, addresses of flags

    def __post_init__(self) -> None:
        assert len(self.buffers) == len(self.flags) and all(t.is_contiguous() for t in (*self.buffers, *self.flags))
        assert all(buffer.data_ptr() % 16 == 0 for buffer in self.buffers), "kernels count on 16 bytes"
        object.__setattr__(self, "table", address(self.buffers))
        object.__setattr__(self, "flag_table", address(self.flags))

    @property
    def buffer(self) -> Tensor:
        """This rank's own."""
        return self.buffers[self.rank]

    @property
    def own_flags(self) -> Tensor:
        """This rank's own."""
        return self.flags[self.rank]


def address(tensors: Sequence[Tensor]) -> Tensor:
    """Their addresses, [n] int64, where they are themselves."""
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64, device=tensors[0].device)


def allocate(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that peers can map. The same size and dtype on every rank."""
    return symmetric.empty(*size, dtype=dtype, device=device).zero_()


def connect(buffer: Tensor, flags: Tensor, group: dist.ProcessGroup) -> Peers:
    """All ranks of ``group`` call it with what ``allocate`` gave them: ``flags`` int32, ``buffer`` of any dtype."""
    handle, flag_handle = symmetric.rendezvous(buffer, group), symmetric.rendezvous(flags, group)
    ranks = range(handle.world_size)
    device = torch.cuda.get_device_properties(buffer.device)
    peers = Peers(
        handle.rank,
        # ``handle.buffer_ptrs`` are where allocations begin; a tensor may begin later.
        tuple(handle.get_remote_tensor(peer, buffer.shape, buffer.dtype) for peer in ranks),
        tuple(flag_handle.get_remote_tensor(peer, flags.shape, flags.dtype) for peer in ranks),
        handle.barrier,
        max(1, device.multi_processor_count - RESERVED),
        torch.cuda.Stream(buffer.device, priority=-1),
    )
    peers.barrier()  # every rank's flags are zero
    return peers


def all_gather_matmul(peers: Peers, weight: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """The shards [rows, K] in the ranks' buffers, gathered [n, rows, K], and times ``weight`` [N, K], [n, rows, N].

    ``chunks`` of a shard are copied one by one, by this rank, while tiles of what has come are computed.
    """
    shard, ranks = peers.buffer, len(peers.buffers)
    chunk = -(-len(shard) // chunks)
    gathered = shard.new_empty(ranks, *shard.shape)
    arrived = torch.zeros(ranks, chunks, dtype=torch.int32, device=shard.device)
    gathered[peers.rank].copy_(shard)
    peers.barrier()  # every shard is where it is read
    with _beside(peers):
        for step in range(1, ranks):
            source = (peers.rank + step) % ranks
            for i, (there, here) in enumerate(
                zip(peers.buffers[source].split(chunk), gathered[source].split(chunk), strict=True)
            ):
                here.copy_(there)
                mark(arrived, source * chunks + i)
    out = gather_matmul(gathered, arrived, weight, peers.rank, peers.programs, default_tile())
    _join(peers)
    peers.barrier()  # shards may be overwritten
    return gathered, out


def matmul_reduce_scatter(peers: Peers, x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [n, rows, K] times ``weight`` [N, K], summed over ranks: this rank's rows, [rows, N].

    Buffers are the slots [n, rows, N], flags are [n, chunks].
    """
    peers.barrier()  # every slot has been read, every flag is zero
    tables = Tables(peers.table, peers.flag_table, peers.own_flags.shape[1])
    matmul_scatter(x, weight, tables, peers.rank, peers.programs, default_tile())
    out = sum_slots(peers.buffer, peers.own_flags, peers.programs)
    peers.own_flags.zero_()
    return out


def dispatch_rows(peers: Peers, tokens: Tensor, rows: rows_out.Rows, received: Tensor) -> Tensor:
    """``tokens`` [T, H] to the ranks that ``rows`` names -> this rank's buffer [R, H], filled by all ranks in order.

    Flags are [n]; ``received`` [n] int32 is how many rows each rank sends here.
    """
    peers.barrier()  # every buffer has been read, every flag is zero
    grid = (peers.rank, peers.programs)
    rows_out.dispatch(tokens, rows, peers.table, peers.flag_table, grid)
    await_flags(peers.own_flags, received)
    peers.own_flags.zero_()
    return peers.buffer


def combine_rows(peers: Peers, rows: rows_out.Rows, tokens: int) -> Tensor:
    """The sums [T, H] of the rows of each of ``tokens``, from the ranks' buffers [R, H]. Flags are [n]."""
    announce(peers.flag_table, peers.rank)  # this rank's rows are there
    out = peers.buffer.new_empty(tokens, peers.buffer.shape[1])
    rows_out.combine(out, rows, peers.table, peers.own_flags, peers.programs)
    peers.own_flags.zero_()
    peers.barrier()  # rows may be overwritten
    return out


@contextmanager
def _beside(peers: Peers) -> Iterator[None]:
    """What is started inside runs beside this stream, after what this stream has to do by now."""
    if peers.stream is None:
        yield
        return
    peers.stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(peers.stream):
        yield


def _join(peers: Peers) -> None:
    if peers.stream is not None:
        torch.cuda.current_stream().wait_stream(peers.stream)
