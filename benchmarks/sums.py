"""Two ways to sum a buffer that is cut into a piece for each rank: an exchange and a sum, and the backend's own.

    python benchmarks/sums.py --ranks 2 4 --megabytes 56

Ranks are processes of this machine with one thread each, over gloo; medians of interleaved rounds, of the slowest rank.
Afterwards each way sums again what lies in the buffer, cut elsewhere: whether a bit of any sum differs.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from parallel import reduce
from parallel.mesh import connect, disconnect, sums_itself

WAYS = {"an exchange and a sum": sums_itself, "gloo's reduce-scatter": lambda group: False}


def work(rank: int, ranks: int, elements: int, rounds: int, folder: str) -> None:
    """A rank's process; rank 0 prints."""
    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, ranks, Path(folder) / "store")
    group = dist.group.WORLD
    assert group is not None
    size = elements // ranks
    pieces = [range(size * place, size * (place + 1)) for place in range(ranks)]
    summands = torch.randn(size * ranks, generator=torch.Generator().manual_seed(rank))
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(rounds + 2):
        for name in WAYS:
            buffer = summands.clone()
            dist.barrier()
            started = perf_counter()
            sum_pieces(name, buffer, pieces, group)
            dist.barrier()
            seconds[name].append(perf_counter() - started)
    for name in WAYS:
        same = torch.tensor(is_independent_of_cuts(name, summands[: 64 * ranks], group))
        dist.all_reduce(same, dist.ReduceOp.MIN)
        if rank == 0:
            bits = "the same bits however it is cut" if same else "other bits where it is cut elsewhere"
            print(f"{ranks} ranks  {name:22} {median(seconds[name][2:]) * 1e3:6.1f} ms  {bits}", flush=True)
    disconnect()


def sum_pieces(name: str, buffer: Tensor, pieces: Sequence[range], group: dist.ProcessGroup) -> None:
    """The way ``name``."""
    chosen = reduce.sums_itself
    reduce.sums_itself = WAYS[name]
    reduce.reduce_pieces(buffer, pieces, group)()
    reduce.sums_itself = chosen


def is_independent_of_cuts(name: str, summands: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether a buffer, summed at once and in two halves, comes to the same bits."""
    ranks, rank = group.size(), group.rank()
    whole = [torch.zeros(0)] * 2
    for number, parts in enumerate((1, 2)):
        buffer = torch.zeros_like(summands)
        for part, own in zip(summands.clone().chunk(parts), buffer.chunk(parts), strict=True):
            size = len(part) // ranks
            sum_pieces(name, part, [range(size * place, size * (place + 1)) for place in range(ranks)], group)
            own[size * rank : size * (rank + 1)] = part[size * rank : size * (rank + 1)]
        dist.all_reduce(buffer)  # pieces are disjoint
        whole[number] = buffer
    return torch.equal(*whole)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--megabytes", type=float, default=56)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for ranks in options.ranks:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, int(options.megabytes * 1e6 / 4), options.rounds, folder)
            multiprocessing.spawn(work, arguments, ranks)


if __name__ == "__main__":
    main()
