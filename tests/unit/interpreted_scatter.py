"""Checks of the scattering product that run in Triton's interpreter: see interpreted_start.py."""

import multiprocessing
import time
from typing import Any

import torch
from interpreted_gather import TILE, whole
from interpreted_start import run_ranks
from torch import Tensor

from parallel.kernels import gemm_scatter
from parallel.kernels.flags import Launch
from parallel.kernels.gemm_scatter import Tables, matmul_scatter, reference, sum_slots
from parallel.kernels.peers import address

LAUNCH = Launch(8, 16, 1)


class Group:
    """What all ranks own, in memory that forked ranks share. Slots are poisoned."""

    def __init__(self, ranks: int, shape: tuple[int, int, int], chunks: int, dtype: torch.dtype) -> None:
        rows, columns, depth = shape
        self.xs = [whole(ranks, rows, depth, dtype=dtype, seed=r) for r in range(ranks)]
        self.weights = [whole(columns, depth, dtype=dtype, seed=9 + r) for r in range(ranks)]
        self.slots = [torch.full((ranks, rows, columns), torch.nan, dtype=dtype).share_memory_() for _ in self.xs]
        self.flags = [torch.zeros(ranks, chunks, dtype=torch.int32).share_memory_() for _ in self.xs]
        self.tables = Tables(address(self.slots), address(self.flags), chunks)

    def multiply(self, rank: int, programs: int) -> None:
        matmul_scatter(self.xs[rank], self.weights[rank], self.tables, rank, programs, TILE)

    def sum(self, rank: int, programs: int = 2) -> Tensor:
        return sum_slots(self.slots[rank], self.flags[rank], programs, LAUNCH)

    def wanted(self, rank: int) -> Tensor:
        return reference(self.xs, self.weights, rank)


def check_numbers(ranks: int, shape: tuple[int, int, int], chunks: int, dtype: str) -> None:
    group = Group(ranks, shape, chunks, getattr(torch, dtype))
    for rank in range(ranks):
        group.multiply(rank, programs=1 + 2 * rank)
    rows, columns, _ = shape
    chunk = -(-rows // chunks)
    written = torch.tensor([min(chunk, rows - start) * columns for start in range(0, rows, chunk)], dtype=torch.int32)
    for rank in range(ranks):
        assert torch.equal(group.flags[rank], written.expand(ranks, -1)), "every element is counted once"
        assert torch.equal(group.sum(rank), group.wanted(rank))


def check_order_of_sums() -> None:
    """Bit for bit the sum in the order of ranks, whoever computes it, rounded once."""
    slots = torch.randn(4, 21, 19, generator=torch.Generator().manual_seed(0))
    arrived = torch.full((4, 1), 21 * 19, dtype=torch.int32)
    wanted = slots[0] + slots[1] + slots[2] + slots[3]
    assert not torch.equal(wanted, slots[3] + slots[2] + slots[1] + slots[0])
    for programs, launch in ((1, LAUNCH), (5, LAUNCH), (2, Launch(32, 8, 1))):
        assert torch.equal(sum_slots(slots, arrived, programs, launch), wanted)
    a, b, c, d = slots.bfloat16().float()
    assert torch.equal(sum_slots(slots.bfloat16(), arrived, 2, LAUNCH), (a + b + c + d).bfloat16())


def check_order_of_tiles() -> None:
    """The next rank's tiles first, then round the ring, this rank's own last; a flag rises behind what it counts."""
    group = Group(3, (20, 40, 16), 1, torch.float32)
    raise_flag, owners = gemm_scatter.raise_flag, []
    starts = [flags.data_ptr() for flags in group.flags]

    def logged(flag: Any, by: Any) -> None:
        owners.append(starts.index(flag.handle.data.item() - 4))  # flag [1, 0] of its owner
        raise_flag(flag, by)
        written = group.slots[owners[-1]][1].isfinite().sum()
        assert written == group.flags[owners[-1]][1, 0]

    gemm_scatter.raise_flag = logged
    try:
        group.multiply(1, programs=1)
    finally:
        gemm_scatter.raise_flag = raise_flag
    assert owners == [2] * 6 + [0] * 6 + [1] * 6


def check_ranks(ranks: int, dtype: str) -> None:
    """Every rank a process: whoever is early waits in its sums for whoever is late."""
    group = Group(ranks, (21, 19, 37), 2, getattr(torch, dtype))
    run_ranks(ranks, _rank, group)


def _rank(rank: int, group: Group) -> None:
    time.sleep(0.1 * rank)
    group.multiply(rank, programs=2)
    assert torch.equal(group.sum(rank), group.wanted(rank))


def check_reading_early_shows() -> None:
    """Without waiting, rank 0 sums what rank 1 has not sent, and sees it: the check above can fail."""
    group = Group(2, (21, 19, 37), 2, torch.float32)
    run_ranks(2, _early, group, multiprocessing.get_context("fork").Event())


def _early(rank: int, group: Group, summed: Any) -> None:
    if rank == 0:
        gemm_scatter.wait_for = lambda flag, value: None
        group.multiply(0, programs=1)
        assert group.sum(0).isnan().all()
        summed.set()
    else:
        assert summed.wait(20)
        group.multiply(1, programs=1)
