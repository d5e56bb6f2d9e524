"""A small run of four ranks, pp=2 and ep=2 on two nodes of two ranks, as a user of a cluster submits it."""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client import ENDED, Client, until

PYTHON = sys.executable
MODEL = ("num_layers=2", "hidden=32", "ffn=48", "attention.heads=2", "moe.ffn=16")
WORDS = (
    *(f"model.{word}" for word in MODEL),
    *("data.corpus=[text.txt]", "data.sequence_length=32", "data.workers=1", "precision=fp32", "verify=skip"),
    *("run.steps=8", "run.global_batch=4", "run.micro_batch=1", "run.threads=1", "run.eval_tokens=512"),
    *("run.sample.tokens=0", "checkpoint.save=false", "health.heartbeat=0.5"),
    "preflight.when=never",  # nodes that share two cores are not alike: test_preflight_nodes.py
    *("parallel.pp=2", "parallel.dp=2", "parallel.ep=2"),
)
CLUSTER = ("cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=2", "cluster.timeout_min=30")
LONG = ("run.steps=40", "checkpoint.every=5", "checkpoint.keep=20")
TRAIN = [PYTHON, "-m", "launcher.train", *WORDS]
CLOCKS = ("seconds", "tokens_per_second", "peak_memory")  # what may differ between two runs
SECONDS = 200  # until a run that does not come to its end has failed


def write_text(folder: Path) -> None:
    """What the runs train on."""
    lines = (f"line {i}: the {i * i} quick brown foxes jump over {i % 7} lazy dogs — naïvely\n" for i in range(900))
    (folder / "text.txt").write_text("".join(lines))


def submit(cluster: Client, folder: Path, run: str, *words: str) -> str:
    """`shoestring submit` in ``folder`` -> the job's number."""
    command = [PYTHON, "-m", "launcher.submit", *WORDS, *CLUSTER, f"run.id={run}", *words]
    said = cluster.run(command, cwd=folder).stdout
    found = re.search(r"job (\d+)", said)
    assert found is not None, said
    return found[1]


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Steps and evaluations of a run, without what a clock says."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows if row["kind"] in ("step", "eval")]


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Steps of a run alone."""
    return [row for row in read_rows(run) if row["kind"] == "step"]


def expect(folder: Path, steps: int = 40) -> list[dict[str, Any]]:
    """What steps of a run are to be: those of ``runs/long``, which nothing has happened to."""
    return [row for row in steps_of(folder / "runs" / "long") if row["step"] < steps]


def wait_for_step(run: Path, step: int) -> None:
    """Returns once the run has taken so many steps."""
    assert until(lambda: len(read_rows(run)) >= step, SECONDS), (
        f"{run} does not come to step {step}\n{read_output(run)}"
    )


def wait_for_end(cluster: Client, run: Path, job: str, states: Sequence[str] = ENDED) -> str:
    """What the job's output is once it has ended."""
    assert until(lambda: cluster.show(job)["JobState"] in states, SECONDS), read_output(run)
    return read_output(run)


def read_output(run: Path) -> str:
    """What Slurm has kept of the run's jobs."""
    return "\n".join(path.read_text() for path in sorted(run.glob("job-*.out")))


def read_state(run: Path) -> dict[str, Any]:
    """How the run stands, by its own word."""
    path = run / "state.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "nothing yet"}
