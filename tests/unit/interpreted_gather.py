"""Checks of the gathering product that run in Triton's interpreter: see interpreted_start.py."""

import threading
import time
from typing import Any

import torch
from torch import Tensor

from parallel.kernels import gather_gemm
from parallel.kernels.gather_gemm import gather_matmul, reference
from parallel.kernels.tile import Tile

TILE = Tile(16, 16, 16, 1, 1)


def whole(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """-1, 0 and 1: sums of them are exact in every dtype and order, so that results are equal or wrong."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(dtype)


def check_numbers(ranks: int, shape: tuple[int, int, int], chunks: int, dtype: str) -> None:
    rows, columns, depth = shape
    kind = getattr(torch, dtype)
    gathered, weight = whole(ranks, rows, depth, dtype=kind), whole(columns, depth, dtype=kind, seed=1)
    for rank, programs in {0: 1, ranks - 1: 3}.items():
        arrived = torch.ones(ranks, chunks, dtype=torch.int32)
        arrived[rank] = 0  # nobody asks
        got = gather_matmul(gathered, arrived, weight, rank, programs, TILE)
        assert got.dtype == kind and torch.equal(got, reference(gathered, weight))


class Late:
    """Chunks that come one by one, each once all before it have been computed; and what the kernel did meanwhile."""

    def __init__(self, monkey: Any, ranks: int = 3, rows: int = 40, chunks: int = 2) -> None:
        self.log: list[Any] = []
        self.shards, self.weight = whole(ranks, rows, 20), whole(16, 20, seed=1)
        self.gathered = torch.full_like(self.shards, torch.nan)
        self.arrived = torch.zeros(ranks, chunks, dtype=torch.int32)
        self.chunk = rows // chunks
        self.rank = 1
        self.gathered[self.rank] = self.shards[self.rank]
        multiply = gather_gemm.multiply

        def logged(x: Any, weight: Any, places: Any, *rest: Any) -> Any:
            first = (x.handle.data.item() - self.gathered.data_ptr()) // (4 * 20) + places.handle.data[0].item()
            self.log.append(("compute", first // rows, first % rows // self.chunk))
            return multiply(x, weight, places, *rest)

        monkey.append((gather_gemm, "multiply", multiply))
        gather_gemm.multiply = logged

    def order(self) -> list[tuple[int, int]]:
        """Of chunks: own first, then round the ring."""
        ranks, chunks = self.arrived.shape
        return [((self.rank + step) % ranks, chunk) for step in range(ranks) for chunk in range(chunks)]

    def fill(self) -> None:
        each = -(-self.chunk // TILE.rows)
        for i, (source, chunk) in enumerate(self.order()):
            if source == self.rank:
                continue
            while len(self.log) < (each + 1) * i - self.arrived.shape[1]:
                time.sleep(0.001)
            time.sleep(0.02)  # time to read too early
            part = slice(chunk * self.chunk, (chunk + 1) * self.chunk)
            self.log.append(("fill", source, chunk))
            self.gathered[source, part] = self.shards[source, part]
            self.arrived[source, chunk] = 1


def restore(monkey: list[Any]) -> None:
    for where, name, value in monkey:
        setattr(where, name, value)


def check_waits() -> None:
    """Own tiles run before anything has come; every other tile after its chunk, and before the next has come."""
    monkey: list[Any] = []
    late = Late(monkey)
    thread = threading.Thread(target=late.fill, daemon=True)
    try:
        thread.start()
        got = gather_matmul(late.gathered, late.arrived, late.weight, late.rank, 1, TILE)
        thread.join()
    finally:
        restore(monkey)
    assert torch.equal(got, reference(late.shards, late.weight))
    wanted = []
    for source, chunk in late.order():
        wanted += [("fill", source, chunk)] * (source != late.rank) + [("compute", source, chunk)] * 2
    assert late.log == wanted


def check_reading_early_shows() -> None:
    """Without waiting, what has not come is read, and the result says so: the checks above can fail."""
    monkey: list[Any] = [(gather_gemm, "wait_for", gather_gemm.wait_for)]
    late = Late(monkey)
    try:
        gather_gemm.wait_for = lambda flag, value: None
        got = gather_matmul(late.gathered, late.arrived, late.weight, late.rank, 1, TILE)
    finally:
        restore(monkey)
    assert got.isnan().any(dim=2).all(dim=1).tolist() == [True, False, True]


def check_never() -> None:
    """A chunk that never comes is waited for."""
    monkey: list[Any] = []
    late = Late(monkey)
    done = threading.Event()

    def work() -> None:
        gather_matmul(late.gathered, late.arrived, late.weight, late.rank, 1, TILE)
        done.set()

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        early, computed = done.wait(0.3), len(late.log)
    finally:
        late.arrived.fill_(1)
        thread.join(20)
        restore(monkey)
    assert done.is_set() and not early and computed == 4, "tiles of the two chunks that are its own"
