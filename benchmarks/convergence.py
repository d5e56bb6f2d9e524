"""Does training in FP8 end where training in BF16 does? Runs of preset small, told apart by precision, seed and layout.

    python benchmarks/convergence.py runs/convergence              all runs that are not there yet, then the table
    python benchmarks/convergence.py runs/convergence --table      the table of those that are

Each run is a real ``shoestring train`` on the default corpus. Its figure is the held-out loss on ``TOKENS`` tokens,
averaged over the evaluations of its last fifth; its gap is that to BF16 of the same seed. Two layouts in BF16 show what
a gap means that comes from rounding alone. Runs that were published as failures are among them: 128 x 128 blocks for
gradients of activations (DeepSeek-V3, appendix B.2), and a single scale for each tensor. Interrupted, the same command
begins the run again that was under way, and no other.
"""

import argparse
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOKENS, EVERY = 131072, 50


class Kind(NamedTuple):
    """A way to train, and how many seeds it gets."""

    words: str
    seeds: int
    recipe: str | None = None  # in place of the published one


KINDS = {
    "bf16": Kind("precision=bf16 run.threads=1", 2),
    "fp8": Kind("precision=fp8 run.threads=1", 2),
    "bf16, dp 2": Kind("precision=bf16 run.threads=1 parallel.dp=2 run.micro_batch=4 verify=skip", 2),
    "mxfp8": Kind("precision=mxfp8 run.threads=1", 1),
    "fp8, gradients by blocks": Kind("precision=fp8 run.threads=1", 1, "blocks"),
    "fp8, a scale a tensor": Kind("precision=fp8 run.threads=1", 1, "tensors"),
}


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


def list_runs() -> list[tuple[str, int]]:
    """Kinds and seeds, the first of every pair that is compared before others."""
    return [(name, seed) for seed in (0, 1) for name, kind in KINDS.items() if seed < kind.seeds]


def locate(folder: Path, name: str, seed: int) -> Path:
    """Where a run's record lies once it is over."""
    return folder / f"{name.replace(',', '').replace(' ', '-')}-{seed}.jsonl"


def train(folder: Path, name: str, seed: int, steps: int) -> None:
    """One run, to its end."""
    print(f"{name}, seed {seed} ...", flush=True)
    kind = KINDS[name]
    record = locate(folder, name, seed)
    run = folder / "runs" / f"{os.getpid()}-{record.stem}"
    words = ["run=small", f"run.steps={steps}", f"run.seed={seed}", *kind.words.split(), f"run.eval_every={EVERY}"]
    words += [f"run.eval_tokens={TOKENS}", "run.compile=off", "run.sample.tokens=0", "checkpoint.save=false"]
    words += [f"run.folder={run.parent}", f"run.id={run.name}", f"data.folder={folder / 'data'}"]
    start = [sys.executable, __file__, str(folder), "--recipe", kind.recipe] if kind.recipe else []
    command = [*start, "--train"] if start else [sys.executable, "-m", "launcher.train"]
    subprocess.run([*command, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (run / "metrics.jsonl").replace(record)


class Outcome(NamedTuple):
    """What a run came to."""

    held_out: float  # nats a token, mean over the evaluations of the last fifth
    steps: int


def read(path: Path) -> Outcome:
    """Of a record."""
    from training import metrics

    steps = len(metrics.read(path, "step"))
    last = [row["loss"] for row in metrics.read(path, "eval") if row["step"] > steps * 4 // 5]
    return Outcome(sum(last) / len(last) if last else math.nan, steps)


def show(folder: Path) -> None:
    """The table."""
    print(f"{'run':<28}{'seed':>5}{'steps':>7}{'held-out':>10}{'gap to bf16':>13}")
    for name, seed in list_runs():
        path, base = locate(folder, name, seed), locate(folder, "bf16", seed)
        if not path.exists():
            continue
        outcome = read(path)
        gap = f"{100 * (outcome.held_out / read(base).held_out - 1):+.3f}%" if base.exists() and name != "bf16" else ""
        print(f"{name:<28}{seed:>5}{outcome.steps:>7}{outcome.held_out:>10.4f}{gap:>13}")


def main() -> None:
    """Runs what is missing, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of a thread each (one has two ranks)")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        from launcher import cli

        replace_recipe(options.recipe)
        sys.exit(cli.main(["train", *options.train]))
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    missing = [run for run in list_runs() if not locate(folder, *run).exists()]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda run: train(folder, *run, options.steps), [] if options.table else missing))
    show(folder)


if __name__ == "__main__":
    main()
