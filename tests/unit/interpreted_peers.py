"""Checks of the calls on connected buffers, between processes, in Triton's interpreter: see interpreted_start.py."""

import multiprocessing
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from interpreted_dispatch import SPARE, Routed
from interpreted_gather import whole
from interpreted_start import run_ranks
from torch import Tensor

from parallel.kernels import peers as edge
from parallel.kernels.dispatch import reference_combine
from parallel.kernels.gather_gemm import reference as gathered_product
from parallel.kernels.gemm_scatter import reference as scattered_sum
from parallel.kernels.peers import Peers

ROWS, COLUMNS, DEPTH, USES = 21, 19, 37, 2


class Shared:
    """Buffers and flags of all ranks in memory that forked ranks share, and a barrier of them."""

    def __init__(self, buffers: list[Tensor], *flags: int) -> None:
        self.buffers = tuple(buffer.share_memory_() for buffer in buffers)
        self.flags = tuple(torch.zeros(flags, dtype=torch.int32).share_memory_() for _ in buffers)
        self.barrier = multiprocessing.get_context("fork").Barrier(len(buffers))

    def peers(self, rank: int) -> Peers:
        return Peers(rank, self.buffers, self.flags, lambda: self.barrier.wait(20) and None, programs=2)


def inputs(ranks: int, use: int) -> tuple[list[Tensor], list[Tensor]]:
    """A rank's x [n, rows, K] and weight [N, K], for all, other ones at every use."""
    seeds = range(10 * use, 10 * use + ranks)
    xs = [whole(ranks, ROWS, DEPTH, seed=seed) for seed in seeds]
    return xs, [whole(COLUMNS, DEPTH, seed=100 + seed) for seed in seeds]


def check_all_gather_matmul(ranks: int) -> None:
    shared = Shared([torch.full((ROWS, DEPTH), torch.nan) for _ in range(ranks)])
    run_ranks(ranks, _all_gather_matmul, shared)


def _all_gather_matmul(rank: int, shared: Shared) -> None:
    peers = shared.peers(rank)
    for use in range(USES):
        xs, weights = inputs(len(shared.buffers), use)
        time.sleep(0.05 * rank)
        peers.buffer.copy_(xs[rank][0])
        gathered, out = edge.all_gather_matmul(peers, weights[rank], chunks=2)
        wanted = torch.stack([x[0] for x in xs])
        assert torch.equal(gathered, wanted) and torch.equal(out, gathered_product(wanted, weights[rank]))


def check_matmul_reduce_scatter(ranks: int) -> None:
    slots = [torch.full((ranks, ROWS, COLUMNS), torch.nan) for _ in range(ranks)]
    run_ranks(ranks, _matmul_reduce_scatter, Shared(slots, ranks, 2))


def _matmul_reduce_scatter(rank: int, shared: Shared) -> None:
    peers = shared.peers(rank)
    for use in range(USES):
        xs, weights = inputs(len(shared.buffers), use)
        time.sleep(0.05 * rank)
        out = edge.matmul_reduce_scatter(peers, xs[rank], weights[rank])
        assert torch.equal(out, scattered_sum(xs, weights, rank))
        assert not peers.own_flags.any()


def check_dispatch_and_combine(tokens: list[int]) -> None:
    """Buffers of one size on every rank, as symmetric memory wants them."""
    routed = Routed(tokens, 20, torch.float32)
    most = int(routed.counts.sum(0).max()) + SPARE
    there, back = ([torch.full((most, 20), torch.nan) for _ in tokens] for _ in range(2))
    run_ranks(len(tokens), _there_and_back, routed, Shared(there, len(tokens)), Shared(back, len(tokens)))


def _there_and_back(rank: int, routed: Routed, there: Shared, back: Shared) -> None:
    out, home, n = there.peers(rank), back.peers(rank), len(routed.tokens)
    received, rows = routed.counts[:, rank].int(), routed.rows(rank)
    for use in range(USES):
        time.sleep(0.05 * rank)
        arrived = edge.dispatch_rows(out, routed.tokens[rank] + use, rows, received)[: int(received.sum())]
        assert torch.equal(arrived, routed.sent(rank) + use)
        home.buffer[: len(arrived)] = arrived * 2
        got = edge.combine_rows(home, rows, len(routed.tokens[rank]))
        home.buffer.fill_(torch.nan)  # nobody reads it any more
        made = [(routed.sent(r) + use) * 2 for r in range(n)]
        assert torch.equal(got, reference_combine(made, routed.copies[rank], routed.counts, rank))


class Handle:
    """What a rendezvous gives, made up: two ranks, both of this process. Names as in torch."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.rank, self.world_size, self.barriers = 1, len(tensors), 0
        self._tensors = tensors

    def get_remote_tensor(self, peer: int, size: torch.Size, dtype: torch.dtype) -> Tensor:
        assert self._tensors[peer].shape == size and self._tensors[peer].dtype == dtype
        return self._tensors[peer]

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        self.barriers += 1


def check_connect() -> None:
    """With a made-up handle, and as a CPU has no streams, without one."""
    shards, flags = [whole(ROWS, DEPTH, seed=seed) for seed in (1, 2)], [torch.zeros(2, dtype=torch.int32)] * 2
    handles = {id(shards[1]): Handle(shards), id(flags[1]): Handle(flags)}
    for name in ("rank", "world_size", "get_remote_tensor", "barrier"):
        assert hasattr(torch._C._distributed_c10d._SymmetricMemory, name)
    assert callable(symmetric.empty) and callable(symmetric.rendezvous)
    stand_ins: list[tuple[Any, str, Any]] = [
        (symmetric, "rendezvous", lambda tensor, group: handles[id(tensor)]),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=11)),
        (torch.cuda, "Stream", lambda *args, **options: None),
    ]
    before = [getattr(where, name) for where, name, _ in stand_ins]
    for where, name, value in stand_ins:
        setattr(where, name, value)
    try:
        peers = edge.connect(shards[1], flags[1], None)  # type: ignore[arg-type]
    finally:
        for (where, name, _), value in zip(stand_ins, before, strict=True):
            setattr(where, name, value)
    assert peers.table.tolist() == [shard.data_ptr() for shard in shards] and peers.programs == 3
    assert peers.buffer is shards[1] and handles[id(shards[1])].barriers == 1
    weight = whole(COLUMNS, DEPTH)
    gathered, out = edge.all_gather_matmul(peers, weight, chunks=3)
    assert torch.equal(gathered, torch.stack(shards)) and torch.equal(out, gathered_product(gathered, weight))
    assert handles[id(shards[1])].barriers == 3, "one before shards are read, one after"
