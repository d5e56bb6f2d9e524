"""How much of communication shows, without overlap and with it, on links from fast to slow.

    python benchmarks/overlap.py                       every case at every rate; hours on a laptop
    python benchmarks/overlap.py pairs --rates 200     one case at one rate, in Mbit/s; 0: no limit

Of every rate of the links, in one run and interleaved, the median time with C computation alone (links have no limit,
and where that can be nothing is sent), K communication alone (nothing is computed), without overlap, and with it, from
which

    exposed = (time - C) / K        at least (K - C) / K where communication takes longer: no order of work hides that

Computation is waiting, long enough for ``--ratio`` at ``--base``, but for the case "awake" (benchmarks/trials.py).
Ranks live in network namespaces on shaped links (benchmarks/network.py), which needs root.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks.network import Links, Network, can_make
from benchmarks.trials import Awake, Experts, Gradients, Layout, Products, Trial, Variant

WINDOW = 32768  # bytes: at these rates enough, and counts need not wait long behind rows
RATES = (None, 200.0, 100.0, 80.0, 40.0)  # Mbit/s of every link, both ways


class Case(NamedTuple):
    """A mechanism: ranks, what they make, and the ways it is taken, the first of which is without."""

    ranks: int
    make: Callable[[], Trial]
    ways: tuple[str, ...]
    title: str


def experts(layout: Layout, variants: dict[str, Variant], kind: type[Experts] | type[Awake] = Experts) -> Case:
    """A case of tokens to experts and back."""
    title = (
        f"pp={layout.pp} ep={layout.ep}, {layout.schedule}, {layout.layers} layers, {layout.microbatches} micro-batches"
    )
    return Case(layout.pp * layout.ep, lambda: kind(layout, variants), tuple(variants), title)


PAIRS = Layout(1, 4, "interleaved_1f1b_overlap", 1, 32)
FEW = PAIRS._replace(schedule="1f1b", microbatches=6)
TURNS, TOGETHER = {"in turns": Variant(False)}, {"together": Variant(True)}
CASES = {
    "pairs": experts(PAIRS, TURNS | TOGETHER),
    "gradients": experts(PAIRS._replace(schedule="1f1b"), TURNS | {"filled": Variant(True)}),
    "dualpipev": experts(Layout(2, 2, "dualpipev", 4, 32), TURNS | TOGETHER),
    "eager_dualpipev": experts(Layout(2, 2, "eager_dualpipev", 4, 32), TURNS | TOGETHER),
    "eager_dualpipev_long": experts(Layout(2, 2, "eager_dualpipev", 4, 64), TURNS | TOGETHER),
    "pieces": experts(FEW, TURNS | {f"{n} pieces": Variant(False, n) for n in (2, 4)}),
    "shared": experts(FEW, TURNS | {"beside": Variant(False, shared=True)}),
    "gather": Case(4, lambda: Products("gather"), ("joined", "blocks"), "all-gather and product, tp=4"),
    "scatter": Case(4, lambda: Products("scatter"), ("joined", "blocks"), "product and reduce-scatter, tp=4"),
    "data": Case(
        4, lambda: Gradients(6, 4, 2**18), ("in turns", "beside"), "sums and copies of dp=4, 6 layers of 1 MiB, 1f1b"
    ),
    "awake": experts(PAIRS._replace(ep=2, layers=2, microbatches=8), TURNS | TOGETHER, Awake),
}


def slowest(seconds: float) -> float:
    """Of all ranks."""
    taken = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item()


def measure(rank: int, world: int, store: Path, links: Links, name: str, options: argparse.Namespace) -> None:
    """A rank of a case; rank 0 prints."""
    from parallel.mesh import connect, disconnect

    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, world, store)
    case = CASES[name]
    trial = case.make()

    def limit(rate: float | None) -> None:
        """Shapes all links, while nothing is on its way."""
        dist.barrier()
        if rank == 0:
            links.shape(rate or None)
        dist.barrier()

    unit = calibrate(trial, case.ways[0], options, limit) if trial.calibrated else 1.0
    if rank == 0:
        asleep = f", a unit of computation {1e3 * unit:.0f} ms" if trial.calibrated else ""
        print(
            f"\n{name}: {case.title}{asleep}; milliseconds, median of {options.rounds}; load {os.getloadavg()[0]:.1f}"
        )
        print(f"{'Mbit/s':>8}{'C':>7}{'K':>7}{'K/C':>6}{'floor':>7}", end="")
        print("".join(f" |{way:>11}{'exposed':>8}" for way in case.ways), flush=True)
    for rate in options.rates or RATES:
        row = measure_rate(trial, case.ways, unit, options.rounds, lambda limited, rate=rate: limit(limited and rate))
        if rank == 0:
            show(rate, row)
    disconnect()


def calibrate(trial: Trial, way: str, options: argparse.Namespace, limit: Callable[[float | None], None]) -> float:
    """Seconds of a unit with which, at the base rate, communication takes ``ratio`` of computation."""
    some = 4e-3
    none, long = (median(slowest(trial.take(None, unit)) for _ in range(3)) for unit in (0.0, some))
    limit(options.base)
    alone = median(slowest(trial.take(way, 0.0)) for _ in range(3))
    unit = torch.tensor((alone / options.ratio - none) / (long - none) * some)
    dist.broadcast(unit, 0)
    return unit.item()


def measure_rate(
    trial: Trial, ways: tuple[str, ...], unit: float, rounds: int, limit: Callable[[bool], None]
) -> list[float]:
    """Median seconds: computation, communication, and every way. ``limit`` puts limits on links, or takes them off."""
    taken = []
    for _ in range(rounds + 1):
        limit(False)
        compute = slowest(trial.take(None, unit))
        limit(True)
        times = [slowest(trial.take(ways[0], 0.0)), *(slowest(trial.take(way, unit)) for way in ways)]
        taken.append([compute, *times])
    return [median(times) for times in zip(*taken[1:], strict=True)]


def show(rate: float | None, row: list[float]) -> None:
    """A line of the table."""
    compute, communication, *ways = row
    floor = max(0.0, (communication - compute) / communication)
    figures = "".join(f" |{1e3 * taken:>11.0f}{(taken - compute) / communication:>8.2f}" for taken in ways)
    print(
        f"{rate or 'none':>8}{1e3 * compute:>7.0f}{1e3 * communication:>7.0f}{communication / compute:>6.2f}"
        f"{floor:>7.2f}{figures}",
        flush=True,
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(CASES), choices=[*CASES, []])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--base", type=float, default=80.0, help="Mbit/s at which communication takes RATIO of computation"
    )
    parser.add_argument("--ratio", type=float, default=0.9)
    parser.add_argument("--rates", type=float, nargs="*", help="Mbit/s; 0: no limit")
    options = parser.parse_args()
    if reason := can_make():
        raise SystemExit(f"no network to measure on: {reason}")
    for name in options.what:
        with Network(CASES[name].ranks, None, WINDOW) as network:
            network.run(measure, network.links, name, options)


if __name__ == "__main__":
    main()
