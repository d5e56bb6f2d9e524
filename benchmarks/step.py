"""A whole training step against transformers' DeepseekV3ForCausalLM and against its own bare matrix products.

    python benchmarks/step.py                        all shapes and precisions
    python benchmarks/step.py --shapes 8x256 --precisions bf16 --rounds 9

Every contender is a process of its own that holds the same weights and trains on the same batch; rounds are interleaved
(one step of each in turn), figures are medians. A step is forward, backward, clipping, AdamW over float32 masters and,
for ours, load statistics and the bias update. The floor runs the step's matrix products and nothing else, expert loads
even and the masked half of attention left out. Memory is the process' peak resident size above what it was before the
model. transformers runs with those of its implementations that are fastest here: --peer names them, else all are tried.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ("floor", "ours", "ours compiled", "transformers", "transformers compiled")
Product = tuple[int, int, int, int, int]  # batch, rows, inner, columns, how often


def products(config, batch: int, length: int) -> Iterator[Product]:  # type: ignore[no-untyped-def]
    """Every forward product of a step; its two gradients have the same sizes."""
    from model.core import BLOCK

    tokens, a, moe = batch * length, config.attention, config.moe
    moe_layers = config.num_layers - config.dense_layers
    rows = tokens * moe.top_k // moe.experts
    for inner, outer, count in (
        (config.hidden, a.q_rank + a.kv_rank + a.rope_dim, config.num_layers),
        (a.q_rank, a.heads * (a.nope_dim + a.rope_dim), config.num_layers),
        (a.kv_rank, a.heads * (a.nope_dim + a.v_dim), config.num_layers),
        (a.heads * a.v_dim, config.hidden, config.num_layers),
        (config.hidden, 2 * config.ffn, config.dense_layers),
        (config.ffn, config.hidden, config.dense_layers),
        (config.hidden, config.vocab_size, 1),
        (config.hidden, 2 * moe.ffn * moe.shared_experts, moe_layers),
        (moe.ffn * moe.shared_experts, config.hidden, moe_layers),
    ):
        yield 1, tokens, inner, outer, count
    yield 1, rows, config.hidden, 2 * moe.ffn, moe_layers * moe.experts
    yield 1, rows, moe.ffn, config.hidden, moe_layers * moe.experts
    for end in range(BLOCK, length + BLOCK, BLOCK):
        yield batch * a.heads, min(BLOCK, length), a.nope_dim + a.rope_dim, min(end, length), config.num_layers
        yield batch * a.heads, min(BLOCK, length), min(end, length), a.v_dim, config.num_layers


def build_floor(config, dtype, batch: int, length: int) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """A step of products only: y = x w, gx = gy w^T, gw = x^T gy, each as often as the model has it."""
    import torch

    sets = []
    for b, m, k, n, count in products(config, batch, length):
        x, w, y = (torch.randn(b, *shape).to(dtype) for shape in ((m, k), (n, k), (m, n)))
        gx, gw = torch.empty_like(x), torch.empty_like(w)
        operands = [t[0] if b == 1 else t for t in (x, w, y, gx, gw)]
        sets.append((torch.mm if b == 1 else torch.bmm, operands, count))

    def step() -> None:
        for multiply, (x, w, y, gx, gw), count in sets:
            for _ in range(count):
                multiply(x, w.mT, out=y)
                multiply(y, w, out=gx)
                multiply(y.mT, x, out=gw)

    return step


def build_ours(config, dtype, batch, compiled: bool) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """Our step, as training/loop.py runs it."""
    import torch

    from model.batch import Denominators
    from model.compile import compile_segments
    from model.precision import Numerics
    from parallel.build import build_sharded
    from parallel.mesh import Mesh, connect
    from parallel.topology import Topology
    from training.config import OptimizerConfig
    from training.native import Native

    connect(torch.device("cpu"))
    mesh = Mesh(Topology(), torch.device("cpu"))
    model, shards = build_sharded(config, Numerics(dtype), 0, mesh)
    if compiled:
        compile_segments(model)
    engine = Native({0: model}, shards, mesh, OptimizerConfig(lr=1e-3))
    sequences, length = batch.ids.shape[0], batch.ids.shape[1] - 1
    denominators = Denominators((float(sequences * length),), float(sequences))

    def step() -> None:
        engine.begin()
        losses = engine.forward(0, batch, denominators)
        engine.backward(0, losses.total)
        engine.finished(0)
        engine.step(1e-3)
        model.update_biases(losses.load, config.moe.bias_speed)

    return step


def build_peer(config, dtype, batch, compiled: bool, choice: list[str]) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    """The peer's step with the same weights; ``choice``: which of its attention and experts."""
    from benchmarks.peer import Peer
    from model.build import build

    peer = Peer(build(config, dtype, "cpu", seed=0), dtype, compiled, *choice)
    return lambda: peer.step(batch)


def work(contender: str, shape: str, precision: str, threads: int, choice: list[str]) -> None:
    """A contender's process: one step for every line on standard input, its seconds and memory as a line back."""
    import torch

    from launcher.compose import Composer
    from model.batch import Batch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Composer().compose(("run=small",))[0].model
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    sequences, length = map(int, shape.split("x"))
    ids = torch.randint(0, 256, (sequences, length + 1))
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)
    if contender.startswith("transformers"):
        import_module("benchmarks.peer")  # what importing transformers takes is not the model's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if contender == "floor":
        step = build_floor(config, dtype, sequences, length)
    elif contender.startswith("ours"):
        step = build_ours(config, dtype, batch, "compiled" in contender)
    else:
        step = build_peer(config, dtype, batch, "compiled" in contender, choice)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": seconds, "memory": (peak - before) / 2**20, "peak": peak / 2**20}), flush=True)


class Worker:
    """A contender's process and what it measured."""

    def __init__(self, contender: str, shape: str, precision: str, threads: int, choice: tuple[str, ...]) -> None:
        command = [sys.executable, __file__, "--work", contender, shape, precision, str(threads)]
        command += ["--peer", *choice] if choice else []
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=None, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.seconds: list[float] = []
        self.last: dict[str, float] = {}

    def step(self, record: bool) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit(f"{self.process.args} died")
        self.last = json.loads(line)
        if record:
            self.seconds.append(self.last["seconds"])

    def close(self) -> None:
        self.process.communicate()


def choose_peers(options: argparse.Namespace, shape: str, precision: str) -> dict[str, tuple[str, ...]]:
    """Attention and experts of each contender that is transformers: those asked for, or the fastest of all."""
    peers = [name for name in options.contenders if name.startswith("transformers")]
    if options.peer:
        return dict.fromkeys(peers, tuple(options.peer))
    from benchmarks.peer import choose

    return {name: choose(shape, precision, "compiled" in name, options.threads) for name in peers}


def measure(options: argparse.Namespace, shape: str, precision: str) -> None:
    """Interleave the contenders and print tokens/s, ratios and memory."""
    contenders, rounds, threads = options.contenders, options.rounds, options.threads
    choices = choose_peers(options, shape, precision)
    sequences, length = map(int, shape.split("x"))
    workers = {name: Worker(name, shape, precision, threads, choices.get(name, ())) for name in contenders}
    for worker in workers.values():
        for _ in range(3):
            worker.step(record=False)
    for _ in range(rounds):
        for worker in workers.values():
            worker.step(record=True)
    print(f"\n{shape} {precision}, {threads} threads, median of {rounds} interleaved rounds")
    for name, choice in choices.items():
        print(f"  {name}: attention {choice[0]}, experts {choice[1]}")
    floor = statistics.median(workers["floor"].seconds) if "floor" in workers else float("nan")
    for name, worker in workers.items():
        median = statistics.median(worker.seconds)
        ratios = "  ".join(
            f"{statistics.median(workers[other].seconds) / median:5.2f}x {other}"
            for other in ("transformers", "transformers compiled")
            if other in workers and name.startswith("ours")
        )
        print(
            f"  {name:22s} {sequences * length / median:7.0f} tokens/s  {floor / median:5.1%} of the floor  "
            f"{worker.last['memory']:5.2f} GiB (process {worker.last['peak']:.2f})  {ratios}"
        )
        worker.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["8x256", "2x1024"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", nargs=2, metavar=("ATTENTION", "EXPERTS"), help="of transformers; else the fastest")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        contender, shape, precision, threads = arguments.work
        work(contender, shape, precision, int(threads), arguments.peer)
        return
    for precision in arguments.precisions:
        for shape in arguments.shapes:
            measure(arguments, shape, precision)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
