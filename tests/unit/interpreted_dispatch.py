"""Checks of dispatch and combine that run in Triton's interpreter: see interpreted_start.py."""

import multiprocessing
import time
from typing import Any

import torch
from interpreted_start import run_ranks
from torch import Tensor

from model.exchange import Copies
from parallel.exchange import address as choose
from parallel.exchange import copy_out
from parallel.kernels import dispatch as kernels
from parallel.kernels.dispatch import Rows, combine, dispatch, find_rows, reference_combine, reference_dispatch
from parallel.kernels.flags import Launch, announce, await_flags
from parallel.kernels.peers import address

LAUNCH = Launch(4, 16, 1)
SPARE = 3  # rows of every buffer that nothing may touch


class Routed:
    """Tokens of every rank, routed at random, and buffers in memory that forked ranks share, poisoned."""

    def __init__(self, tokens: list[int], width: int, dtype: torch.dtype, idle: int = -1) -> None:
        """``tokens`` of each rank; no expert of rank ``idle`` is chosen."""
        generator, n = torch.Generator().manual_seed(len(tokens) + width), len(tokens)
        self.tokens = [torch.randn(t, width, generator=generator).mul(50).to(dtype) for t in tokens]
        self.copies, counts = [], []
        for t in tokens:
            slots = torch.randint(0, 2 * n, (t, 3), generator=generator)  # two experts a rank
            slots = slots.where(slots // 2 != idle, (slots + 2) % (2 * n))
            sending = choose(slots, 2 * n, n)
            counts.append(sending.counts[:, 0])
            self.copies.append(copy_out(sending.touched, int(counts[-1].sum())))
        self.counts = torch.stack(counts)  # [n, n]
        held = self.counts.sum(0).tolist()
        blank = 255 if dtype == torch.uint8 else torch.nan
        self.buffers = [torch.full((r + SPARE, width), blank, dtype=dtype).share_memory_() for r in held]
        self.arrived = [torch.zeros(n, dtype=torch.int32).share_memory_() for _ in held]
        self.ready = [torch.zeros(n, dtype=torch.int32).share_memory_() for _ in held]
        self.tables = address(self.buffers), address(self.arrived), address(self.ready)

    def rows(self, rank: int) -> Rows:
        return find_rows(self.copies[rank], self.counts, rank)

    def send(self, rank: int, programs: int = 2) -> None:
        dispatch(self.tokens[rank], self.rows(rank), *self.tables[:2], (rank, programs), LAUNCH)

    def receive(self, rank: int) -> Tensor:
        await_flags(self.arrived[rank], self.counts[:, rank].int())
        return self.buffers[rank][:-SPARE]

    def bring_back(self, rank: int, programs: int = 2) -> Tensor:
        out = torch.empty_like(self.tokens[rank])
        return combine(out, self.rows(rank), self.tables[0], self.ready[rank], programs, LAUNCH)

    def sent(self, rank: int) -> Tensor:
        return reference_dispatch(self.tokens, self.copies, self.counts, rank)


def check_dispatch(tokens: list[int], width: int, dtype: str, idle: int = -1) -> None:
    routed = Routed(tokens, width, getattr(torch, dtype), idle)
    assert idle < 0 or routed.counts[:, idle].sum() == 0
    for rank in range(len(tokens)):
        routed.send(rank, programs=1 + 2 * rank)
    for rank in range(len(tokens)):
        assert torch.equal(routed.receive(rank), routed.sent(rank))
        assert torch.equal(routed.arrived[rank], routed.counts[:, rank].int())
        spare = routed.buffers[rank][-SPARE:].float()
        assert (spare.isnan() | (spare == 255)).all(), "rows behind the last"


def check_order_of_rows() -> None:
    """The next rank's rows first, then round the ring, this rank's own last; a flag rises behind what it counts."""
    routed = Routed([4, 9, 5], 40, torch.float32)
    raise_flag, seen = kernels.raise_flag, []
    starts = [flags.data_ptr() for flags in routed.arrived]

    def logged(flag: Any, by: Any) -> None:
        seen.append(starts.index(flag.handle.data.item() - 4))  # flag [1] of the rank
        raise_flag(flag, by)
        written = routed.buffers[seen[-1]].isfinite().all(dim=1).sum()
        assert written == routed.arrived[seen[-1]][1]

    kernels.raise_flag = logged
    try:
        routed.send(1, programs=1)
    finally:
        kernels.raise_flag = raise_flag
    blocks = [-(-int(sent) // LAUNCH.rows) for sent in routed.counts[1]]
    assert seen == [2] * blocks[2] + [0] * blocks[0] + [1] * blocks[1] and max(blocks) > 1


def check_combine(tokens: list[int], width: int, dtype: str, idle: int = -1) -> None:
    """Bit for bit the sum in the order of ranks."""
    routed = Routed(tokens, width, getattr(torch, dtype), idle)
    for buffer in routed.buffers:
        buffer.copy_(torch.randn(buffer.shape))
    for rank in range(len(tokens)):
        announce(routed.tables[2], rank)
    rows = [buffer[:-SPARE] for buffer in routed.buffers]
    for rank in range(len(tokens)):
        wanted = reference_combine(rows, routed.copies[rank], routed.counts, rank)
        assert torch.equal(routed.bring_back(rank, programs=1 + rank), wanted)


def check_a_token_without_rows() -> None:
    copies = Copies(torch.tensor([1]), torch.tensor([0]), torch.tensor([0, 0, 1]))  # of three tokens, the second's only
    buffer, ready = torch.ones(1, 8), torch.ones(1, dtype=torch.int32)
    rows = find_rows(copies, torch.tensor([[1]]), 0)
    got = combine(torch.full((3, 8), torch.nan), rows, address([buffer]), ready, 2, LAUNCH)
    assert got[:, 0].tolist() == [0, 1, 0]


def check_each_is_the_gradient_of_the_other() -> None:
    """Against autograd through the references of all ranks."""
    routed = Routed([5, 4, 7], 12, torch.float32)
    for tokens in routed.tokens:
        tokens.round_().requires_grad_()
    gradients = [torch.randn(buffer[:-SPARE].shape).mul(8).round() for buffer in routed.buffers]
    for rank, gradient in enumerate(gradients):
        routed.sent(rank).backward(gradient)
        routed.buffers[rank][:-SPARE] = gradient
        announce(routed.tables[2], rank)
    assert all(torch.equal(routed.bring_back(rank), tokens.grad) for rank, tokens in enumerate(routed.tokens))

    rows = [torch.randn(gradient.shape).requires_grad_() for gradient in gradients]
    for rank, tokens in enumerate(routed.tokens):
        sums = reference_combine([r * 1 for r in rows], routed.copies[rank], routed.counts, rank)
        gradient = torch.randn(sums.shape)
        sums.backward(gradient)
        with torch.no_grad():
            tokens.copy_(gradient)
    for rank in range(3):
        routed.send(rank)
    assert all(torch.equal(routed.receive(rank), r.grad) for rank, r in enumerate(rows))


def check_ranks(tokens: list[int], dtype: str) -> None:
    """Every rank a process: there, through experts that double and add, and back."""
    run_ranks(len(tokens), _rank, Routed(tokens, 20, getattr(torch, dtype)))


def _rank(rank: int, routed: Routed) -> None:
    n = len(routed.tokens)
    time.sleep(0.1 * (n - rank))
    routed.send(rank)
    received = routed.receive(rank)
    assert torch.equal(received, routed.sent(rank))
    time.sleep(0.2 * rank)  # rows that are read too early are not doubled yet
    received.mul_(2)
    announce(routed.tables[2], rank)
    wanted = reference_combine([routed.sent(r) * 2 for r in range(n)], routed.copies[rank], routed.counts, rank)
    assert torch.equal(routed.bring_back(rank), wanted)


def check_reading_early_shows() -> None:
    """Without waiting, rank 0 reads what rank 1 has not written: the check above can fail."""
    run_ranks(2, _early, Routed([6, 6], 20, torch.float32), multiprocessing.get_context("fork").Event())


def _early(rank: int, routed: Routed, read: Any) -> None:
    if rank == 0:
        kernels.wait_for = lambda flag, value: None
        assert routed.bring_back(0).isnan().any()
        read.set()
    else:
        assert read.wait(20)
