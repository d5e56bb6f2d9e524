"""A run comes through faults by the commands that a user types, each noticed by name; what it says of a hang, of a slow
rank, and where memory runs out."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_train import SMALL

from training.health.config import Fault

SHORT = ["data.corpus=[text.txt]", *SMALL, "precision=bf16", "run.micro_batch=1"]
# Six kinds, all that a run is to notice by itself: numbers, memory, disk, a hang, a death, damage.
SIX = ["0:3:backward:nan", "1:6:forward:flip", "1:9:writing:full", "0:12:all-to-all:stop", "1:15:optimizer:kill"]
SIX += ["0:18:loading:corrupt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torture")
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} foxes jump over {i % 7} dogs\n" for i in range(900)))
    return folder


def call(
    folder: Path, verb: str, *words: str, code: int = 0, before: Callable[[], None] | None = None
) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", f"launcher.{verb}", *SHORT, *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=2400, preexec_fn=before)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.timeout(600)
def test_six_faults_leave_every_loss_as_it_was(folder: Path) -> None:
    from launcher.campaign import judge
    from launcher.ordeal import read_marks, read_rows, start
    from launcher.torture import LAYOUT, WORDS
    from training.health.config import parse

    words = [*WORDS, *LAYOUT, *SHORT[1:], f"data.corpus=[{folder / 'text.txt'}]", f"data.folder={folder / 'data'}"]
    words += ["run.steps=22", "run.eval_every=11", "health.hang=12"]
    start(folder / "runs", "undisturbed", words, ())
    expected = read_rows(folder / "runs" / "undisturbed")
    faults = [parse(text) for text in SIX]
    lines = start(folder / "runs", "disturbed", words, faults)
    results = judge(faults, read_marks(folder / "runs" / "disturbed", faults), lines)
    assert all(result.happened and result.noticed for result in results), results
    assert sum(row["kind"] != "load" for row in expected) == 24 < len(expected)
    assert read_rows(folder / "runs" / "disturbed") == expected
    assert sum("starting again from the checkpoint after step" in line.text for line in lines) == 3
    before = folder / "runs" / "disturbed" / "before"
    assert sorted(path.name for path in before.iterdir()) == ["1", "2", "3"]
    check_hang(folder / "runs" / "disturbed")


def check_hang(run: Path) -> None:
    """The report of the rank that was stopped."""
    (report,) = run.glob("before/*/logs/hang.txt")
    first, *lines = report.read_text().splitlines()
    assert first == "no rank has gone on for 12 s: rank 0 is stuck; rank 1 is waiting for it"
    assert lines[0].startswith("rank 0 on ") and lines[0].endswith(": it is stopped by a signal")
    assert lines[1].startswith("rank 1 on ") and "waits in step 12 > " in lines[1]
    assert "rank 0\nhas left no stack" in report.read_text() and "in run_step" in report.read_text()
    record = json.loads((report.parent / "rank1" / "record.json").read_text())
    assert record["error"] == f"HangError: {first}" and record["action"].startswith("step 12 > ")


@pytest.mark.full
@pytest.mark.timeout(2500)
def test_a_campaign_of_every_kind_and_phase(folder: Path) -> None:
    done = call(
        folder, "torture", "run.steps=30", "run.eval_every=15", "faults=25", "seed=3", f"run.folder={folder / 'long'}"
    )
    rows = [line for line in done.stdout.splitlines() if "same bits" in line]
    assert len(rows) >= 25 and done.stdout.splitlines()[-1].startswith(
        f"{len(rows)} of {len(rows)} faults were noticed"
    )
    assert f"{len(Fault)} kinds in 8 phases" in done.stdout.splitlines()[-1]


def test_a_rank_that_is_slow_is_named(folder: Path) -> None:
    words = ["parallel.dp=2", "parallel.ep=2", "verify=skip", "run.steps=12", "checkpoint.save=false", "run.id=slow"]
    words += ["health.heartbeat=0.5", "health.window=1.5", "health.faults=['1:2:backward:slow']", "run.threads=1"]
    said = call(folder, "train", *words).stdout
    assert "rank 1 is slow, or has more to do: it computes" in said and "rank 0 is slow" not in said


@pytest.mark.full
def test_where_memory_runs_out_is_said_with_what_to_change(folder: Path) -> None:
    """A limit that the kernel sets: the model fits, a step of 65,536 sequences at once does not."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))

    words = ["run.global_batch=65536", "run.micro_batch=65536", "run.steps=1", "run.id=large", "data.held_out=0.2"]
    said = call(folder, "train", *words, code=2, before=limit).stderr
    assert said.startswith("shoestring: rank 0 ran out of memory in step 1 > 0F0"), said
    assert "more were asked for" in said and "Lower run.micro_batch=65536: activations shrink with it" in said


def test_faults_that_are_none_are_refused(folder: Path) -> None:
    said = call(folder, "train", "health.faults=['1:2:sideways:kill']", code=2).stderr
    assert said.startswith("shoestring: health.faults: 1:2:sideways:kill must be rank:step:phase:kind")
    said = call(folder, "torture", "faults=0", code=2).stderr
    assert said == "shoestring: faults=0 must be at least 1\n"
