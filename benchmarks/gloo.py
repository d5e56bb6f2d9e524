"""What gloo gets through a network of a chosen rate: the table that ``python benchmarks/network.py`` prints.

one to one    a large message from rank 0 to rank 1
both ways     the same, and one back at the same time
all, pieces   every rank to every other, as sends and receives
all-to-all    the same by all_to_all_single
beside bulk   1 kB there and back on connections of its own while a large message runs: the median, the most

A rate is in MB/s of payload out of a rank, until the last rank has everything; its share is of what the link carries,
of which headers take 0.7%. Medians of ``ROUNDS`` after one that does not count. 1 kB goes there and back by gloo's send
and receive, which exchange more than one packet each way.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.network import Network, can_make
from parallel.mesh import connect, disconnect

RATES = (50.0, 200.0, 1000.0, 2500.0, 5000.0, 0.0)  # Mbit/s; 0: no limit
SECONDS, ROUNDS = 0.4, 3  # a large message takes that long
UNLIMITED = 8000.0  # Mbit/s: its size where there is no limit


class Row(NamedTuple):
    """What gloo got through: rates in MB/s out of one rank, times in milliseconds for 1 kB there and back."""

    one: float  # from one rank to another
    both: float  # between two ranks at once
    pieces: float  # every rank to every other, as sends and receives
    collective: float  # the same by all_to_all_single
    alone: float
    beside: float  # a message from one rank to another, on connections of its own; the median
    longest: float


class Meter:
    """A rank's stopwatch. Small messages have a group, and so connections, of their own."""

    def __init__(self, rank: int, world: int, size: int) -> None:
        self.rank, self.world, self.size = rank, world, size // world * world
        self.small = dist.new_group()
        self.out, self.back = (torch.zeros(self.size, dtype=torch.uint8) for _ in range(2))

    def exchange(self, pairs: set[tuple[int, int]], size: int) -> list[Any]:
        """Starts a message of ``size`` bytes from ``a`` to ``b`` for each of ``pairs``."""
        parts = self.back[: size * (self.world - 1)].split(size)
        sources = sorted(a for a, b in pairs if b == self.rank)
        works = [dist.irecv(part, a) for part, a in zip(parts, sources, strict=False)]
        return works + [dist.isend(self.out[:size], b) for a, b in sorted(pairs) if a == self.rank]

    def rate(self, start: Callable[[], list[Any]], size: int) -> float:
        """MB/s when every rank starts work that moves ``size`` bytes out of one."""
        seconds = []
        for _ in range(1 + ROUNDS):
            dist.barrier(self.small)
            began = time.perf_counter()
            for work in start():
                work.wait()
            dist.barrier(self.small)
            seconds.append(time.perf_counter() - began)
        return size / 1e6 / median(seconds[1:])

    def ping(self, times: int) -> list[float]:
        """Milliseconds for 1 kB from rank 0 to rank 1 and back."""
        found, message = [], torch.zeros(1000, dtype=torch.uint8)
        for _ in range(times):
            began = time.perf_counter()
            for turn in (self.rank, 1 - self.rank):
                (dist.send if turn == 0 else dist.recv)(message, 1 - self.rank, group=self.small)
            found.append((time.perf_counter() - began) * 1e3)
        return found


def measure(rank: int, world: int, store: Path, megabits: float | None) -> Row:
    """A rank of one line of the table."""
    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, world, store)
    meter = Meter(rank, world, round((megabits or UNLIMITED) * 125e3 * SECONDS))
    size, every = meter.size, {(a, b) for a in range(world) for b in range(world) if a != b}
    share = size // world
    one = meter.rate(lambda: meter.exchange({(0, 1)}, size), size)
    both = meter.rate(lambda: meter.exchange({(0, 1), (1, 0)}, size), size)
    pieces = meter.rate(lambda: meter.exchange(every, share), share * (world - 1))
    whole = meter.rate(lambda: [dist.all_to_all_single(meter.back, meter.out, async_op=True)], share * (world - 1))
    alone, beside = [0.0], [0.0]
    if rank < 2:
        alone = meter.ping(100)
        works = meter.exchange({(0, 1)}, size)
        time.sleep(SECONDS / 10)
        beside = meter.ping(15)
        for work in works:
            work.wait()
    disconnect()
    return Row(one, both, pieces, whole, median(alone), median(beside), max(beside))


def main() -> None:
    """Prints a line for each rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4, help="at least 2")
    parser.add_argument("--rate", type=float, action="append", help="Mbit/s; may be given several times; 0: no limit")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error("--ranks must be at least 2")
    if reason := can_make():
        raise SystemExit(reason)
    began = time.perf_counter()
    with Network(options.ranks, None) as network:
        print(f"{options.ranks} ranks, made in {(time.perf_counter() - began) * 1e3:.0f} ms; "
              f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
        print(f"{'link':>16}{'MB/s out of a rank, gloo, and of the rate':>52}{'1 kB and back, ms':>28}")
        print(f"{'Mbit/s':>8}{'MB/s':>8}{'one to one':>13}{'both ways':>13}{'all, pieces':>13}{'all-to-all':>13}"
              f"{'alone':>8}{'beside bulk':>13}{'most':>7}")  # fmt: skip
        for rate in options.rate or RATES:
            network.shape(rate or None)
            row, *_ = network.run(measure, rate or None)
            full = rate / 8
            shares = [f"{value:>7.1f} {f'{value / full:.0%}' if full else '':>5}" for value in row[:4]]
            print(f"{rate:>8g}{full:>8g}{''.join(shares)}{row.alone:>8.2f}{row.beside:>13.2f}{row.longest:>7.2f}",
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
