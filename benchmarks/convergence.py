"""Does training in FP8 end where training in BF16 does? Runs of preset small, told apart by precision, seed and layout.

    python benchmarks/convergence.py              all runs that have no record yet, then the table
    python benchmarks/convergence.py --table      the table of those that have one, and docs/convergence.svg

Each run is a real ``shoestring train`` on the default corpus. Its figure is the held-out loss on ``TOKENS`` tokens,
averaged over the evaluations of its last fifth; its gap is that to BF16 of the same seed. Two layouts in BF16 show what
a gap means that comes from rounding alone. Runs that were published as failures are among them: 128 x 128 blocks for
gradients of activations (DeepSeek-V3, appendix B.2), and a single scale for each tensor. Interrupted, the same command
goes on with the runs that were under way, from their checkpoints; a record is written when its run is over, and is
small enough to be kept in docs/convergence.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOKENS, EVERY = 131072, 100


class Kind(NamedTuple):
    """A way to train."""

    words: str
    recipe: str | None = None  # in place of the published one


KINDS = {
    "bf16": Kind("precision=bf16 run.threads=1"),
    "fp8": Kind("precision=fp8 run.threads=1"),
    "bf16, dp 2": Kind("precision=bf16 run.threads=1 parallel.dp=2 run.micro_batch=4 verify=skip"),
    "fp8, gradients by blocks": Kind("precision=fp8 run.threads=1", "blocks"),
    "fp8, a scale a tensor": Kind("precision=fp8 run.threads=1", "tensors"),
    "mxfp8": Kind("precision=mxfp8 run.threads=1"),
}
RUNS = [  # of which seed, in the order in which they matter
    *((name, 0) for name in KINDS if name != "mxfp8"),
    *((name, 1) for name in ("fp8", "bf16", "bf16, dp 2")),
    ("mxfp8", 0),
]


def replace_recipe(name: str) -> None:
    """From now on precision=fp8 means another recipe."""
    from model.fp8 import DEEPSEEK_V3, Recipe, Scaling
    from training.config import Precision
    from training.determinism import NUMERICS

    whole = Scaling((2**30, 2**30))
    recipes = {
        "blocks": DEEPSEEK_V3._replace(gradients=Scaling((128, 128))),
        "tensors": Recipe(whole, whole, whole),
    }
    NUMERICS[Precision.fp8] = NUMERICS[Precision.fp8]._replace(recipe=recipes[name])


class Places(NamedTuple):
    """Where things lie."""

    records: Path
    work: Path  # run folders and data, which nobody needs afterwards

    def record(self, name: str, seed: int) -> Path:
        """Of a run that is over."""
        return self.records / f"{name.replace(',', '').replace(' ', '-')}-{seed}.jsonl"


def train(places: Places, name: str, seed: int, steps: int) -> None:
    """One run, to its end."""
    from training import metrics

    print(f"{name}, seed {seed} ...", flush=True)
    kind, record = KINDS[name], places.record(name, seed)
    run = places.work / "runs" / record.stem
    words = ["run=small", f"run.steps={steps}", f"run.seed={seed}", *kind.words.split(), f"run.eval_every={EVERY}"]
    words += [f"run.eval_tokens={TOKENS}", "run.compile=off", "run.sample.tokens=0", "checkpoint.save=false"]
    words += ["checkpoint.resume=auto", f"checkpoint.every={EVERY // 2}", "checkpoint.keep=1"]
    words += [f"run.folder={run.parent}", f"run.id={run.name}", f"data.folder={places.work / 'data'}"]
    start = [sys.executable, __file__, "--recipe", kind.recipe] if kind.recipe else []
    command = [*start, "--train"] if start else [sys.executable, "-m", "launcher.train"]
    subprocess.run([*command, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    losses = [row["loss"] for row in metrics.read(run / "metrics.jsonl", "step")]
    rows = [
        {"run": name, "seed": seed, "steps": len(losses), "processor": name_processor(), "words": " ".join(words[:3])}
    ]
    for row in metrics.read(run / "metrics.jsonl", "eval"):
        lately = losses[max(0, row["step"] + 1 - EVERY) : row["step"] + 1]  # steps count from 0
        rows.append({"step": row["step"], "held_out": row["loss"], "trained": sum(lately) / len(lately)})
    part = record.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part.replace(record)


def name_processor() -> str:
    """As Linux calls it, and whether it has units for BF16."""
    from model.product import HAS_UNITS

    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {'with' if HAS_UNITS else 'without'} BF16"


class Outcome(NamedTuple):
    """What a run came to."""

    held_out: float  # nats a token, mean over the evaluations of the last fifth
    steps: int
    curve: list[float]  # of held-out losses


def read(path: Path) -> Outcome:
    """Of a record."""
    head, *rows = (json.loads(line) for line in path.read_text().splitlines())
    last = [row["held_out"] for row in rows if row["step"] >= head["steps"] * 4 // 5]
    return Outcome(sum(last) / len(last) if last else math.nan, head["steps"], [row["held_out"] for row in rows])


def show(places: Places) -> None:
    """The table, and the curves of seed 0."""
    from curves import draw

    print(f"{'run':<28}{'seed':>5}{'steps':>7}{'held-out':>10}{'gap to bf16':>13}")
    found = {run: read(places.record(*run)) for run in RUNS if places.record(*run).exists()}
    for (name, seed), outcome in found.items():
        base = found.get(("bf16", seed))
        gap = f"{100 * (outcome.held_out / base.held_out - 1):+.3f}%" if base and name != "bf16" else ""
        print(f"{name:<28}{seed:>5}{outcome.steps:>7}{outcome.held_out:>10.4f}{gap:>13}")
    if found:
        places.records.with_suffix(".svg").write_text(
            draw({name: o.curve for (name, seed), o in found.items() if not seed})
        )


def main() -> None:
    """Runs what is missing, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=ROOT / "docs" / "convergence")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "convergence")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of a thread each (one kind has two ranks)")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        from launcher import cli

        replace_recipe(options.recipe)
        sys.exit(cli.main(["train", *options.train]))
    places = Places(options.records.resolve(), options.work.resolve())
    places.records.mkdir(parents=True, exist_ok=True)
    missing = [] if options.table else [run for run in RUNS if not places.record(*run).exists()]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(places, *run, options.steps), missing))
    show(places)


if __name__ == "__main__":
    main()
