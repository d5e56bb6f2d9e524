"""Gather and product, product and sum, of tensor parallelism: one after the other (joined), and block by block.

    python benchmarks/tensor.py --ranks 2 4 --tokens 1024 --inner 1024 --outer 2048 --rounds 9
    python benchmarks/tensor.py --ranks 4 --milliseconds 20          products are waiting of this length

Ranks are processes of this machine with one thread each, over gloo; medians of interleaved rounds, of the slowest rank.
A gather sends rows of width ``inner``, a sum rows of width ``inner`` of products of width ``outer``: gate and up of an
MLP, and down. exposed = (time - product alone) / exchange alone. ``time_operations`` measures on any group.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from parallel.collective_matmul import MATMULS, Operation, Product, multiply
from parallel.mesh import connect, disconnect

WARM = 2  # rounds that are not counted
WAYS = (Operation.joined, Operation.blocks)


class Sizes(NamedTuple):
    """Of whole sequences, [1, tokens, inner] x [inner, outer]; a rank has ``outer`` columns."""

    tokens: int
    inner: int
    outer: int
    dtype: torch.dtype = torch.bfloat16


class Times(NamedTuple):
    """Seconds of the slowest rank, medians over rounds."""

    product: float
    exchange: float
    joined: float
    blocks: float

    def exposed(self, way: Operation) -> float:
        """The part of the exchange that a way does not hide."""
        return (getattr(self, way) - self.product) / self.exchange


def wait(seconds: float, rows: int, x: Tensor, weight: Tensor, out: Tensor) -> None:
    """A product that takes ``seconds`` for ``rows``, and computes nothing."""
    sleep(seconds * len(x) / rows)


def nothing(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """A product that takes no time."""


def time_operations(
    group: dist.ProcessGroup, sizes: Sizes, rounds: int, seconds: float | None = None
) -> dict[str, Times]:
    """Times of "gather" and "scatter" between the ranks of ``group``, all of which call this.

    With ``seconds``, a product of all rows is waiting of that length, and one of a block of its share.
    """
    product: Product = multiply if seconds is None else partial(wait, seconds, sizes.tokens)
    x = torch.randn(1, sizes.tokens, sizes.inner).to(sizes.dtype)
    y = torch.randn(1, sizes.tokens, sizes.outer).to(sizes.dtype)
    wide = torch.randn(sizes.inner, sizes.outer).to(sizes.dtype)
    shard, narrow = x[:, : sizes.tokens // group.size()].clone(), wide.t()
    found = {}
    for name, given, weight in (("gather", shard, wide), ("scatter", y, narrow)):
        rows = (x if name == "gather" else y)[0]
        out = rows.new_empty(sizes.tokens, weight.shape[1])
        calls: dict[str, Callable[[], object]] = {
            "product": partial(product, rows, weight, out),
            "exchange": partial(getattr(MATMULS[Operation.joined], name), [given], [weight], group, nothing),
        }
        calls |= {way: partial(getattr(MATMULS[way], name), [given], [weight], group, product) for way in WAYS}
        found[name] = Times(**_time(group, calls, rounds))
    return found


def _time(group: dist.ProcessGroup, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM + rounds):
        for name, call in calls.items():
            dist.barrier(group)
            started = perf_counter()
            call()
            taken[name].append(perf_counter() - started)
    seconds = torch.tensor([times[WARM:] for times in taken.values()])
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group)
    return {name: median(times) for name, times in zip(taken, seconds.tolist(), strict=True)}


def work(rank: int, ranks: int, options: argparse.Namespace, folder: str) -> None:
    """A rank's process; rank 0 prints."""
    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, ranks, Path(folder) / "store")
    group = dist.group.WORLD
    assert group is not None
    sizes = Sizes(options.tokens, options.inner, options.outer)
    seconds = None if options.milliseconds is None else options.milliseconds / 1e3
    for name, times in time_operations(group, sizes, options.rounds, seconds).items():
        if rank == 0:
            milliseconds = "  ".join(f"{what} {1e3 * value:7.2f}" for what, value in times._asdict().items())
            exposed = "  ".join(f"{way} {times.exposed(way):5.2f}" for way in WAYS)
            print(f"{ranks} ranks  {name:8} ms: {milliseconds}   exposed: {exposed}", flush=True)
    disconnect()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--outer", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--milliseconds", type=float)
    options = parser.parse_args()
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            multiprocessing.spawn(work, (ranks, options, folder), ranks)


if __name__ == "__main__":
    main()
