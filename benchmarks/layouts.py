"""Layouts against one process with the same cores: tokens/s of a training step, the exchange alone, memory as ep grows.

    python benchmarks/layouts.py                    two ranks of one thread against one process of two
    python benchmarks/layouts.py step --compiled --sequences 8
    python benchmarks/layouts.py exchange memory

Steps: preset small in BF16, 32 sequences of 256 tokens a step, by accumulation; every contender keeps its processes,
rounds are interleaved, figures are medians. ``bound``: what one process' speed would be if the layout's bare
collectives, recorded in a real step and repeated without any computation, came on top of it.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STEP = {
    "one process": {},
    "ep=2": {"dp": 2, "ep": 2},
    "dp=2": {"dp": 2},
    "tp=2": {"tp": 2},
}
MEMORY = {f"ep={ep}": {"dp": 8, "ep": ep} for ep in (1, 2, 4, 8)}
LENGTH, MICRO = 256, 8


def connect(rank: int, layout: dict[str, int], store: str) -> Any:
    """The mesh of a worker."""
    import torch
    import torch.distributed as dist

    from parallel.mesh import Mesh
    from parallel.topology import Topology

    topology = Topology(**layout)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=topology.world)
    return Mesh(topology, torch.device("cpu"))


class Contender:
    """The processes of a layout: each line they get is a step, rank 0 answers with its figures."""

    def __init__(self, work: str, layout: dict[str, int], threads: int, options: list[str]) -> None:
        world = layout.get("dp", 1) * layout.get("tp", 1)
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, __file__, "--work", work, json.dumps(layout), f"{self.folder.name}/store"]
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(threads), *options],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    def step(self, line: str = "step") -> list[dict[str, float]]:
        """What every rank measured."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write(f"{line}\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout
            while not (answer := process.stdout.readline()).startswith("{"):
                if not answer:
                    raise SystemExit(f"{process.args} died")
            answers.append(json.loads(answer))
        return answers

    def close(self) -> None:
        for process in self.processes:
            process.communicate()
        self.folder.cleanup()


def build_step(mesh: Any, compiled: bool, sequences: int) -> Callable[[], None]:
    """A training step of this rank's share of the global batch."""
    import torch

    from launcher.compose import Composer
    from model.batch import Batch, Denominators
    from model.compile import compile_segments
    from model.precision import Numerics
    from parallel.build import build_sharded
    from parallel.topology import Axis
    from training.config import OptimizerConfig
    from training.native import Native

    config = Composer().compose(("run=small",))[0].model
    model, shards = build_sharded(config, Numerics(torch.bfloat16), 0, mesh)
    if compiled:
        compile_segments(model)
    engine = Native({0: model}, shards, mesh, OptimizerConfig(lr=1e-3))
    torch.manual_seed(0)
    ids = torch.randint(0, 256, (sequences, LENGTH + 1))
    share = sequences // mesh.degree(Axis.dp)
    mine = ids[mesh.coordinate(Axis.dp) * share :][:share]
    batches = [Batch(part, torch.ones_like(part, dtype=torch.bool), None) for part in mine.split(MICRO)]
    denominators = Denominators((float(sequences * LENGTH),), float(sequences))

    def step() -> None:
        engine.begin()
        for batch in batches:
            engine.backward(0, engine.forward(0, batch, denominators).total)
        engine.finished(0)
        engine.step(1e-3)
        engine.settle()

    return step


def record(step: Callable[[], None]) -> list[Callable[[], Any]]:
    """The collectives of the model in a step, each ready to be repeated with the same sizes."""
    import parallel.exchange
    import parallel.loss
    import parallel.tensor

    calls: list[Callable[[], Any]] = []
    modules = (parallel.exchange, parallel.loss, parallel.tensor)
    originals = [(m, name, getattr(m, name)) for m in modules for name in vars(m) if name in COLLECTIVES]

    def wrap(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            copies = [arg.detach().clone() if hasattr(arg, "detach") else arg for arg in args]
            calls.append(lambda: collective(*copies).wait())
            return collective(*args)

        return call

    for module, name, original in originals:
        setattr(module, name, wrap(original))
    step()
    for module, name, original in originals:
        setattr(module, name, original)
    return calls


COLLECTIVES = ("all_gather", "sum_scatter", "all_to_all", "all_reduce")


def work_step(mesh: Any, options: list[str]) -> None:
    """A worker of a step: ``step`` takes one, ``bare`` repeats its collectives alone."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = build_step(mesh, "compiled" in options, int(options[0]))
    calls: list[Callable[[], Any]] = []
    for line in sys.stdin:
        if line.strip() == "bare" and not calls:
            calls = record(step)
        start = time.perf_counter()
        if line.strip() == "bare":
            for call in calls:
                call()
        else:
            step()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        report(seconds=time.perf_counter() - start, memory=(peak - before) / 2**20)


def work_exchange(mesh: Any, options: list[str]) -> None:
    """A worker of the exchange: to the experts and back; its own all-to-alls alone; one row for every choice alone."""
    import torch

    from model.exchange import permute, unpermute
    from parallel.collectives import all_to_all
    from parallel.exchange import ExpertExchange
    from parallel.mesh import Traffic
    from parallel.topology import Axis

    torch.manual_seed(mesh.rank)
    hidden = int(options[0])
    tokens, experts = torch.randn(2048, hidden).bfloat16(), torch.rand(2048, 16).topk(4).indices
    gates, exchange = torch.rand(2048, 4), ExpertExchange(16, 32, mesh)
    group, ranks = mesh.group(Axis.ep, Traffic.tokens), mesh.degree(Axis.ep)

    def whole() -> None:
        (shipped,) = exchange.dispatch(tokens, gates, exchange.announce(experts))
        there, weights, layout = exchange.arrive(shipped)
        mixed = unpermute(permute(there, layout.copies), weights, layout.copies)
        exchange.collect(exchange.combine((mixed, layout)))

    def bare(sent: list[int], received: list[int]) -> Callable[[], None]:
        forth, back = (torch.randn(sum(rows), hidden).bfloat16() for rows in (sent, received))

        def run() -> None:
            all_to_all(forth, sent, received, group).wait()
            all_to_all(back, received, sent, group).wait()

        return run

    (shipped,) = exchange.dispatch(tokens, gates, exchange.announce(experts))
    arrived, even = exchange.arrive(shipped), [8192 // ranks] * ranks
    contenders = {
        "step": whole,
        "bare": bare(*arrived.layout.home.splits.tolist()),
        "every choice": bare(even, even),
    }
    for line in sys.stdin:
        start = time.perf_counter()
        with torch.no_grad():
            contenders[line.strip()]()
        report(seconds=time.perf_counter() - start)


def report(**figures: float) -> None:
    print(json.dumps(figures), flush=True)


WORK = {"step": work_step, "exchange": work_exchange}


def measure_steps(rounds: int, compiled: bool, sequences: int) -> None:
    options = [str(sequences), *(["compiled"] if compiled else [])]
    contenders = {name: Contender("step", layout, 1 if layout else 2, options) for name, layout in STEP.items()}
    seconds: dict[str, list[float]] = {name: [] for name in [*STEP, "bare tp=2"]}
    for number in range(rounds + 3):
        for name, contender in contenders.items():
            taken = contender.step()[0]["seconds"]
            bare = contender.step("bare")[0]["seconds"] if name == "tp=2" else None
            if number >= 3:
                seconds[name].append(taken)
                if bare is not None:
                    seconds["bare tp=2"].append(bare)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    one, bare, tokens = medians["one process"], medians["bare tp=2"], sequences * LENGTH
    print(f"\n{'compiled' if compiled else 'eager'}, {tokens} tokens a step, median of {rounds} interleaved rounds")
    for name in STEP:
        print(f"  {name:12s} {tokens / medians[name]:7.0f} tokens/s  {one / medians[name]:5.2f} of one process")
    print(f"  bound of tp=2: {one / (one + bare):.2f}, {bare * 1e3:.0f} ms of collectives")
    for contender in contenders.values():
        contender.close()


def measure_exchange(rounds: int) -> None:
    for ranks, hidden in ((2, 256), (4, 256), (2, 7168)):
        contender = Contender("exchange", {"dp": ranks, "ep": ranks}, 1, [str(hidden)])
        lines = ("step", "bare", "every choice")
        taken = [[contender.step(line)[0]["seconds"] for line in lines] for _ in range(rounds + 5)][5:]
        whole, bare, every = (statistics.median(values) * 1e3 for values in zip(*taken, strict=True))
        print(
            f"  2048 tokens of {hidden} x 4 choices a rank over ep={ranks}: {whole:.1f} ms; the same rows by two bare "
            f"all-to-alls {bare:.1f} ms ({statistics.median(a / b for a, b, _ in taken):.2f}), a row for every choice "
            f"{every:.1f} ms ({statistics.median(a / b for a, _, b in taken):.2f})"
        )
        contender.close()


def measure_memory() -> None:
    print("  memory above start, per rank of dp=8, 16 sequences a step")
    for name, layout in MEMORY.items():
        contender = Contender("step", layout, 1, ["16"])
        contender.step()
        worst = max(answer["memory"] for answer in contender.step())
        print(f"  {name:5s} {worst:.2f} GiB")
        contender.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["step", "exchange", "memory"])
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--sequences", type=int, default=32, help="of 256 tokens a step")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "step" in options.what:
        measure_steps(options.rounds, options.compiled, options.sequences)
    if "exchange" in options.what:
        measure_exchange(20 * options.rounds)
    if "memory" in options.what:
        measure_memory()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        import torch

        _, _, kind, layout_text, store_path, rank_text, threads_text, *rest = sys.argv
        torch.set_num_threads(int(threads_text))
        WORK[kind](connect(int(rank_text), json.loads(layout_text), store_path), rest)
    else:
        main()
