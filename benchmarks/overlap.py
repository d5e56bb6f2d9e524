"""How much of communication shows in a step, without overlap and with it, on links from fast to slow.

    python benchmarks/overlap.py pairs alone dualpipev pieces shared     computation is waiting (benchmarks/waiting.py)

Of every rate of the links, in one run and interleaved, the median step with C computation alone (nothing is sent), K
communication alone (nothing is computed), without overlap, and with it, from which

    exposed = (step - C) / K        at least (K - C) / K where communication takes longer: no order of work hides that

Ranks live in network namespaces on shaped links (benchmarks/network.py), which needs root.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from benchmarks.network import Links, Network, can_make
from benchmarks.waiting import Naps, Seconds, put_to_sleep
from model.batch import Batch, Denominators
from model.block import Block
from model.config import AttentionConfig, ModelConfig, MoEConfig
from model.exchange import LocalExchange
from parallel.pipeline.idle import Sleeper

TOKENS, HIDDEN, EXPERTS = 512, 512, 8
WINDOW = 32768  # bytes: at these rates enough, and counts need not wait long behind rows
RATES = (None, 200.0, 100.0, 80.0, 40.0)  # Mbit/s of every link, both ways


class Layout(NamedTuple):
    """Ranks and what they do in a step."""

    pp: int
    ep: int
    schedule: str
    layers: int
    microbatches: int


class Variant(NamedTuple):
    """A way to take the step."""

    overlap: bool
    pieces: int = 1
    shared: bool = False  # a third of the experts' time is shared experts'


class Case(NamedTuple):
    """A mechanism: with it and without it."""

    layout: Layout
    without: Variant
    versions: dict[str, Variant]


MICROBATCHES = 32
PAIRS = Layout(1, 4, "interleaved_1f1b_overlap", 1, MICROBATCHES)
CASES = {
    "pairs": Case(PAIRS, Variant(False), {"pairs": Variant(True)}),
    "alone": Case(PAIRS._replace(schedule="1f1b"), Variant(False), {"gradients": Variant(True)}),
    "dualpipev": Case(Layout(2, 2, "dualpipev", 4, MICROBATCHES), Variant(False), {"pairs": Variant(True)}),
    "pieces": Case(
        PAIRS._replace(schedule="1f1b", microbatches=6),
        Variant(False),
        {f"{n} pieces": Variant(False, n) for n in (2, 4)},
    ),
    "shared": Case(
        PAIRS._replace(schedule="1f1b", microbatches=6), Variant(False), {"shared": Variant(False, shared=True)}
    ),
}


class Bare:
    """Stands where an engine would, without gradients to keep."""

    def __init__(self, stages: dict[int, Any]) -> None:
        self._stages = stages

    def forward(self, stage: int, *args: Any) -> Any:
        return self._stages[stage](*args)

    def unroll(self, stage: int, *args: Any) -> Any:
        from training.engine import unroll_stage

        return unroll_stage(self._stages[stage], *args)

    def backward(self, stage: int, loss: Any, hidden: Any = None) -> None:
        from training.engine import differentiate

        differentiate(loss, hidden)

    def accumulate(self, parameter: Any, grad: Any) -> None:
        pass

    def finishing(self, stage: int, coming: Any = None) -> None:
        pass

    def finished(self, stage: int) -> None:
        pass


class Rank:
    """A rank of a layout whose blocks sleep."""

    def __init__(self, layout: Layout) -> None:
        from parallel.build import build_stages
        from parallel.config import OverlapConfig, ParallelConfig, PipelineConfig, ScheduleName
        from parallel.mesh import Mesh
        from parallel.pipeline.plan import divide_model, schedule_of
        from parallel.topology import Topology
        from training.pipeline import Runner, shape_activations

        self.config = ModelConfig(
            name="asleep", vocab_size=16, num_layers=layout.layers, hidden=HIDDEN, ffn=16, dense_layers=0,
            attention=AttentionConfig(heads=1, kv_rank=8, nope_dim=8, rope_dim=8, v_dim=8),
            moe=MoEConfig(experts=EXPERTS, top_k=2, ffn=8, shared_experts=1, aux_alpha=0.0),
        )  # fmt: skip
        topology = Topology(pp=layout.pp, dp=layout.ep, ep=layout.ep)
        self.mesh = Mesh(topology, torch.device("cpu"))
        pipeline = PipelineConfig(schedule=ScheduleName(layout.schedule))
        self.parallel = ParallelConfig(pp=layout.pp, dp=layout.ep, ep=layout.ep, pipeline=pipeline)
        arranged = divide_model(self.parallel, self.config, schedule_of(self.parallel, layout.microbatches))
        self.mesh.share(arranged.shared(self.config))
        self.stages, _ = build_stages(self.config, torch.bfloat16, 0, self.mesh, arranged, OverlapConfig())
        shapes = shape_activations(self.config, TOKENS, torch.bfloat16, self.mesh)
        self.runner = Runner(self.parallel, arranged, shapes, self.mesh)
        sleeper = Sleeper()
        self.naps = Naps(Seconds(sleeper), Seconds(sleeper), Seconds(sleeper))
        ids = torch.zeros(1, TOKENS + 1, dtype=torch.int64)
        self.batches = [
            Batch(ids.clone(), torch.ones_like(ids, dtype=torch.bool), None) for _ in range(layout.microbatches)
        ]
        self.routed = [b for model in self.stages.values() for b in model.modules() if isinstance(b, Block)]
        self.exchanges = [block.exchange for block in self.routed]

    def step(self, variant: Variant, unit: float, sends: bool = True) -> float:
        """Seconds of the slowest rank; ``unit``: those of a segment's forward."""
        from training.work import Mode

        for model in self.stages.values():
            put_to_sleep(model, self.naps, TOKENS, self.mesh.rank, variant.pieces)
        for block, exchange in zip(self.routed, self.exchanges, strict=True):
            assert exchange is not None
            block.exchange = exchange if sends else LocalExchange(EXPERTS, 1)
            exchange.pieces = variant.pieces
        shared = unit / 3 if variant.shared else 0.0
        self.naps.attention.value, self.naps.experts.value, self.naps.shared.value = unit, unit - shared, shared
        self.runner._mode = Mode(variant.overlap)
        engine, denominators = Bare(self.stages), Denominators((float(TOKENS),), 1.0)
        dist.barrier()
        began = perf_counter()
        self.runner.step(engine, self.batches, denominators)
        taken = torch.tensor(perf_counter() - began, dtype=torch.float64)
        dist.all_reduce(taken, dist.ReduceOp.MAX)
        return taken.item()


def measure(rank: int, world: int, store: Path, links: Links, name: str, options: argparse.Namespace) -> None:
    """A rank of a case; rank 0 prints."""
    from parallel.mesh import connect, disconnect

    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, world, store)
    case = CASES[name]
    sleeping = Rank(case.layout)
    shape(rank, links, options.base)
    # A segment's forward lasts so long that at the base rate communication takes ``ratio`` of computation.
    alone = median(sleeping.step(case.without, 0.0) for _ in range(4))
    ones = sleeping.step(case.without, 1e-3, sends=False) - sleeping.step(case.without, 0.0, sends=False)
    unit = torch.tensor(alone / options.ratio / ones * 1e-3)
    dist.broadcast(unit, 0)
    if rank == 0:
        layout = case.layout
        print(
            f"\n{name}: pp={layout.pp} ep={layout.ep}, {layout.schedule}, {layout.layers} layers, "
            f"{layout.microbatches} micro-batches, a segment {1e3 * unit.item():.0f} ms; milliseconds, "
            f"median of {options.rounds}; load {os.getloadavg()[0]:.1f}"
        )
        print(f"{'Mbit/s':>8}{'C':>7}{'K':>7}{'K/C':>6}{'floor':>7} | {'without':>8}{'exposed':>8}", end="")
        print("".join(f" |{version:>10}{'exposed':>8}" for version in case.versions), flush=True)
    for rate in options.rates or RATES:
        shape(rank, links, rate)
        row = measure_rate(sleeping, case, unit.item(), options.rounds)
        if rank == 0:
            show(rate, row)
    disconnect()


def shape(rank: int, links: Links, rate: float | None) -> None:
    """All links, while nothing is on its way."""
    dist.barrier()
    if rank == 0:
        links.shape(rate or None)
    dist.barrier()


def measure_rate(sleeping: Rank, case: Case, unit: float, rounds: int) -> list[float]:
    """Median seconds: computation, communication, the step without, and with every version."""
    contenders: list[Callable[[], float]] = [
        lambda: sleeping.step(case.without, unit, sends=False),
        lambda: sleeping.step(case.without, 0.0),
        lambda: sleeping.step(case.without, unit),
        *((lambda version=version: sleeping.step(version, unit)) for version in case.versions.values()),
    ]
    taken = [[step() for step in contenders] for _ in range(rounds + 1)][1:]
    return [median(times) for times in zip(*taken, strict=True)]


def show(rate: float | None, row: list[float]) -> None:
    """A line of the table."""
    compute, communication, *steps = row
    floor = max(0.0, (communication - compute) / communication)
    figures = " |".join(
        f"{1e3 * step:>{8 + 2 * (number > 0)}.0f}{(step - compute) / communication:>8.2f}"
        for number, step in enumerate(steps)
    )
    print(
        f"{rate or 'none':>8}{1e3 * compute:>7.0f}{1e3 * communication:>7.0f}{communication / compute:>6.2f}"
        f"{floor:>7.2f} | {figures}",
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
        layout = CASES[name].layout
        with Network(layout.pp * layout.ep, None, WINDOW) as network:
            network.run(measure, network.links, name, options)


if __name__ == "__main__":
    main()
