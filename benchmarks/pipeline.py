"""Pipelines that run against their simulation: time of a step, cost of the interpreter, time lost with a real model.

    python benchmarks/pipeline.py waiting            8 gloo ranks whose stages sleep: a step as long as simulated?
    python benchmarks/pipeline.py nothing            stages that take no time: microseconds an action
    python benchmarks/pipeline.py real --out DIR     preset small over two ranks; DIR gets Perfetto traces

waiting   A rank's share of the model takes --forward ms forward and twice that backward, half of it I and half W, in
          however many stages. All ranks start a step at one moment of the machine's clock; it ends with the last rank.
          Rounds over the schedules are interleaved, figures are medians. Links cost nothing in the simulation.
nothing   The time of a program through its actions; with two ranks also the processor time of the thread that
          interprets, which leaves out its waits for the other rank and the work of gloo's own threads.
real      Simulated with the times that each action of this very step took: what is lost is what a rank waited in excess
          of that, for transfers and for the interpreter.
"""

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep, thread_time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from model.precision import Numerics
from parallel.mesh import Mesh, connect, disconnect
from parallel.pipeline.action import Schedule, parts
from parallel.pipeline.idle import Nothing, Waiting, time_actions
from parallel.pipeline.lower import Exchange, lower
from parallel.pipeline.run import Interpreter
from parallel.pipeline.schedules import SCHEDULES, generate
from parallel.pipeline.simulate import Cost, Timeline, simulate
from parallel.pipeline.trace import Span, write

CPU = torch.device("cpu")
WARM = 2  # steps before those that count


class Candidate(NamedTuple):
    """A schedule to measure."""

    name: str
    virtual: int

    def __str__(self) -> str:
        return f"{self.name} x{self.virtual}" if self.virtual > 1 else self.name


def list_candidates(virtual: tuple[int, ...], only: list[str]) -> list[Candidate]:
    """Every schedule, those that leave it open with each of ``virtual`` stages a rank."""
    return [
        Candidate(name, stages)
        for name, generator in SCHEDULES.items()
        if not only or name in only
        for stages in (virtual if generator.virtual else (1,))
    ]


def start_together(rank: int) -> float:
    """The moment, of the clock that all processes of a machine share, at which a step begins on every rank."""
    moment = torch.tensor(perf_counter() + 0.02, dtype=torch.float64)
    if rank == 0:
        dist.barrier()
        moment.fill_(perf_counter() + 0.02)
    else:
        dist.barrier()
    dist.broadcast(moment, 0)
    sleep(max(0.0, moment.item() - perf_counter()))
    return moment.item()


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def spawn(work: Callable[..., None], ranks: int, *args: Any) -> None:
    """``work(rank, store, *args)`` on ``ranks`` processes."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, (Path(folder) / "store", *args), ranks)


def join(rank: int, ranks: int, store: Path, options: argparse.Namespace) -> None:
    """Makes this process a rank, if so wished before everything else that the machine does."""
    torch.set_num_threads(1)
    if options.first:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    connect(CPU, rank, ranks, store)


def wait(rank: int, store: Path, options: argparse.Namespace) -> None:
    """A rank of the first table; rank 0 prints."""
    join(rank, options.ranks, store, options)
    interpreter = Interpreter(dist.group.WORLD, rank)
    candidates = list_candidates((2, 4), options.only)
    timelines, steps, works = [], [], []
    for name, virtual in candidates:
        schedule = generate(name, options.ranks, options.microbatches, virtual)
        forward = 12 * options.ranks // schedule.stages
        cost = Cost(F=forward, B=2 * forward, I=forward, W=forward)
        timelines.append(simulate(schedule, cost))
        steps.append(lower(schedule).lists[rank])
        works.append(Waiting(schedule.stages, time_actions(schedule, cost, options.forward / 12e3)))
    measured: list[list[float]] = [[] for _ in candidates]
    for _ in range(1 + options.rounds):
        for number, work in enumerate(works):
            began = start_together(rank)
            interpreter.run(steps[number], work)
            measured[number].append(largest(perf_counter() - began))
    peaks = [largest(work.peak) for work in works]
    if rank == 0:
        show_waiting(candidates, timelines, measured, peaks, options)
    disconnect()


def show_waiting(
    candidates: list[Candidate],
    timelines: list[Timeline],
    measured: list[list[float]],
    peaks: list[float],
    options: argparse.Namespace,
) -> None:
    """Prints the first table."""
    print(f"{options.ranks} ranks, {options.microbatches} micro-batches, {options.forward:g} ms forward a rank, "
          f"median of {options.rounds} steps; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip
    print(f"{'':<28}{'step, s':>18}{'':>7}{'bubble':>18}{'activations':>18}")
    print(f"{'':<28}{'simulated':>10}{'run':>8}{'ratio':>7}{'simulated':>10}{'run':>8}{'simulated':>10}{'run':>8}"
          f"{'least':>8}{'most':>8}")  # fmt: skip
    for candidate, timeline, times, peak in zip(candidates, timelines, measured, peaks, strict=True):
        expected = float(timeline.makespan) * options.forward / 12e3
        busy = float(max(timeline.busy)) * options.forward / 12e3
        taken, share = statistics.median(times[1:]), options.ranks / timeline.schedule.stages
        print(f"{candidate!s:<28}{expected:>10.3f}{taken:>8.3f}{taken / expected:>7.3f}{1 - busy / expected:>10.1%}"
              f"{1 - busy / taken:>8.1%}{max(timeline.peaks) * share:>10g}{peak * share:>8g}"
              f"{min(times[1:]) / expected:>8.3f}{max(times[1:]) / expected:>8.3f}", flush=True)  # fmt: skip


def interpret(rank: int, store: Path, options: argparse.Namespace, ranks: int) -> None:
    """A rank of the second table; rank 0 prints."""
    join(rank, ranks, store, options)
    interpreter = Interpreter(dist.group.WORLD if ranks > 1 else None, rank)
    for candidate in list_candidates((2,), options.only):
        if ranks % 2 and SCHEDULES[candidate.name].even:
            continue
        schedule = generate(candidate.name, ranks, options.microbatches, candidate.virtual)
        steps = lower(schedule).lists[rank]
        actions = sum(len(parts(step)) for step in steps if not isinstance(step, Exchange))
        exchanges = sum(isinstance(step, Exchange) for step in steps)
        walls, threads = [], []
        for _ in range(WARM + options.repeat):
            dist.barrier()
            wall, thread = perf_counter(), thread_time()
            interpreter.run(steps, Nothing(schedule.stages))
            threads.append((thread_time() - thread) / actions * 1e6)
            walls.append((perf_counter() - wall) / actions * 1e6)
        wall, thread = (statistics.median(values[WARM:]) for values in (walls, threads))
        if rank == 0:
            print(f"{candidate!s:<28}{ranks:>6}{actions:>9}{exchanges:>11}{thread:>11.1f}{wall:>8.1f}", flush=True)
    disconnect()


def lose(rank: int, store: Path, options: argparse.Namespace) -> None:
    """A rank of the third table; rank 0 prints and writes traces."""
    join(rank, 2, store, options)
    if rank == 0:
        print(f"{'':<28}{'simulated':>10}{'run':>8}{'lost':>7}{'bubble':>8}")
    for candidate in list_candidates((2,), options.only):
        schedule, step = build_step(candidate, options)
        rows = []
        for _ in range(WARM + options.rounds):
            began = start_together(rank)
            spans = step(began)
            taken = largest(perf_counter() - began)
            everyone: list[list[Span]] = [[] for _ in range(2)]
            dist.all_gather_object(everyone, spans)
            timeline = replay(schedule, everyone)
            rows.append((taken / float(timeline.makespan) - 1, taken, timeline, everyone))
        lost, taken, timeline, everyone = sorted(rows[WARM:], key=lambda row: row[0])[options.rounds // 2]
        if rank == 0:
            expected = float(timeline.makespan)
            bubble = max(timeline.bubbles) / expected
            print(f"{candidate!s:<28}{expected:>10.3f}{taken:>8.3f}{lost:>7.1%}{bubble:>8.1%}", flush=True)
            runs = {"simulated": timeline.rows(range(2)), "measured": [span for spans in everyone for span in spans]}
            write(options.out / f"{candidate.name}-{candidate.virtual}.json", runs)
    disconnect()


def replay(schedule: Schedule, everyone: list[list[Span]]) -> Timeline:
    """The simulation with the time that each action took."""
    took = {span.action: span.end - span.start for spans in everyone for span in spans}
    durations = [took[compute] for computes in schedule.lists for compute in computes]
    return simulate(schedule, durations=durations)


def build_step(candidate: Candidate, options: argparse.Namespace) -> tuple[Schedule, Callable[[float], list[Span]]]:
    """A training step of preset small over two pipeline ranks, without the update."""
    from launcher.compose import Composer
    from model.batch import Batch, Denominators
    from parallel.build import build_stages
    from parallel.config import OverlapConfig, ParallelConfig, PipelineConfig, ScheduleName
    from parallel.pipeline.plan import divide_model, schedule_of
    from parallel.topology import Topology
    from training.config import OptimizerConfig
    from training.native import Native
    from training.pipeline import Runner, shape_activations

    config = Composer().compose(("run=small",))[0].model
    parallel = ParallelConfig(
        pp=2, pipeline=PipelineConfig(schedule=ScheduleName(candidate.name), virtual=candidate.virtual)
    )
    schedule = schedule_of(parallel, options.real_microbatches)
    pipeline = divide_model(parallel, config, schedule)
    mesh = Mesh(Topology(pp=2), CPU)
    mesh.share(pipeline.shared(config))
    stages, shards = build_stages(config, Numerics(torch.bfloat16), 0, mesh, pipeline, OverlapConfig())
    engine = Native(stages, shards, mesh, OptimizerConfig(lr=1e-3))
    runner = Runner(parallel, pipeline, shape_activations(config, 256, torch.bfloat16, mesh), mesh)
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (options.real_microbatches, options.sequences, 257))
    batches = [Batch(each, torch.ones_like(each, dtype=torch.bool), None) for each in ids]
    sequences = ids.shape[0] * ids.shape[1]
    denominators = Denominators((256.0 * sequences,) * (1 + config.mtp.depth), float(sequences))

    def step(began: float) -> list[Span]:
        spans: list[Span] = []
        engine.begin()
        runner.step(engine, batches, denominators, spans=spans)
        engine.settle()
        return spans

    return schedule, step


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["waiting", "nothing", "real"])
    parser.add_argument("--only", nargs="*", default=[], choices=SCHEDULES, help="these schedules")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=24)
    parser.add_argument("--forward", type=float, default=72.0, help="milliseconds of a rank's share of the model")
    parser.add_argument("--first", action="store_true", help="real-time priority: run so on a machine that is not idle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=50, help="programs without computation")
    parser.add_argument("--sequences", type=int, default=2, help="of a micro-batch, with the real model")
    parser.add_argument("--real-microbatches", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/pipeline"), help="where traces go")
    options = parser.parse_args()
    if "waiting" in options.what:
        spawn(wait, options.ranks, options)
    if "nothing" in options.what:
        print(f"\nmicroseconds an action; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        print(f"{'':<28}{'ranks':>6}{'actions':>9}{'exchanges':>11}{'processor':>11}{'clock':>8}")
        for ranks in (1, 2):
            spawn(interpret, ranks, options, ranks)
    if "real" in options.what:
        options.out.mkdir(parents=True, exist_ok=True)
        print(f"\npreset small, two ranks, {options.real_microbatches} micro-batches of {options.sequences} x 256 "
              f"tokens, median of {options.rounds} steps; load {os.getloadavg()[0]:.1f}")  # fmt: skip
        spawn(lose, 2, options)


if __name__ == "__main__":
    main()
