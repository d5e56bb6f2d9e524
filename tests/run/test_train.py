"""``shoestring train`` as it is typed: to the end, twice, interrupted, and with mistakes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cli import main

COMMAND = [sys.executable, "-m", "launcher.train"]
MODEL = ("num_layers=2", "hidden=32", "ffn=48", "attention.heads=2", "moe.ffn=16")
SMALL = (
    *(f"model.{word}" for word in MODEL),
    "data.sequence_length=32",
    "data.workers=1",
    "run.steps=8",
    "run.global_batch=8",
    "run.micro_batch=4",
    "run.threads=1",
    "run.eval_tokens=512",
    "run.sample.tokens=20",
)


def train(folder: Path, *overrides: str, code: int = 0, **environment: str) -> str:
    """Runs the command in ``folder``; returns what it printed."""
    words = [*COMMAND, "data.corpus=[text.txt]", *SMALL, *overrides]
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def train_here(*overrides: str) -> int:
    """Runs the command in this process and folder, for what does not depend on the process; returns its exit code."""
    return main(["train", "data.corpus=[text.txt]", *SMALL, *overrides])


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    lines = (f"line {i}: the {i * i} quick brown foxes jump over {i % 7} lazy dogs — naïvely\n" for i in range(900))
    (folder / "text.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What a run to the end prints."""
    return train(folder, "run.id=first", "run.eval_every=4", OMP_NUM_THREADS="1")


def test_a_run_to_the_end(folder: Path, printed: str) -> None:
    run = folder / "runs" / "first"
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "command.txt",
        "versions.json",
        "metrics.jsonl",
        "sample.txt",
        "weights",
    }
    steps = rows(run, "step")
    assert [row["step"] for row in steps] == list(range(8)) and steps[-1]["loss"] < steps[0]["loss"]
    (start,), (end,) = rows(run, "start"), rows(run, "end")
    assert start["threads"] == 1 and end["ending"] == "finished"
    assert f"held-out loss {end['held_out']:.4f} nats a token   (a bigram model: {end['bigram']:.4f})" in printed
    for line in ("step 1/8  loss", "step 8/8  loss", "step 4  held-out loss", "finished after 8 of 8 steps"):
        assert line in printed
    assert "\x1b" not in printed, "no colours, no cursor movements outside a terminal"


def test_the_same_bits_whatever_the_launcher_says_about_threads(folder: Path, printed: str) -> None:
    train(folder, "run.id=again", "run.eval_every=4", OMP_NUM_THREADS="2", MKL_NUM_THREADS="2")
    keys = ("loss", "mtp_losses", "grad_norm", "violation_worst")
    first, again = (rows(folder / "runs" / name, "step") for name in ("first", "again"))
    assert [[row[key] for key in keys] for row in first] == [[row[key] for key in keys] for row in again]
    held_out = [[row["loss"] for row in rows(folder / "runs" / name, "eval")] for name in ("first", "again")]
    assert held_out[0] == held_out[1]
    samples = [(folder / "runs" / name / "sample.txt").read_bytes() for name in ("first", "again")]
    assert samples[0] == samples[1]


def test_ctrl_c_saves_what_there_is(folder: Path, printed: str) -> None:
    words = [*COMMAND, "data.corpus=[text.txt]", *SMALL, "run.steps=100000", "run.id=stopped"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    said.append(process.stdout.read())
    process.stdout.close()
    assert process.wait(timeout=240) == 130
    text, run = "".join(said), folder / "runs" / "stopped"
    taken = len(rows(run, "step"))
    assert f"interrupted after {taken} of 100000 steps" in text and 0 < taken < 100000
    assert f"weights saved in {Path('runs/stopped/weights')}" in text and "Traceback" not in text
    assert (run / "weights" / "manifest.json").exists()
    assert rows(run, "end")[0]["ending"] == "interrupted"


def test_numbers_that_stay_infinite_end_the_run(
    folder: Path, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    wild = ("optimizer.lr=1e30", "optimizer.clip=0", "optimizer.skip_limit=2", "run.steps=200")
    assert train_here(*wild, "run.id=wild") == 1
    text = capsys.readouterr().out
    assert "optimizer.skip_limit=2" in text and "diverged after" in text
    assert [row["skipped"] for row in rows(folder / "runs" / "wild", "step")][-3:] == [True] * 3


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.no_decay=['*nrom*']", "optimizer.no_decay: the pattern '*nrom*' matches no parameter"),
        ("optimizer.moments=bf16 optimizer.beta2=0.999", "optimizer.beta2=0.999 must be at least 0 and below 0.9922"),
        ("run.micro_batch=3", "run.micro_batch=3 must divide run.global_batch=8"),
        ("init_from=nowhere", "nowhere"),
    ],
)
def test_mistakes_are_named(
    folder: Path, word: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert train_here(*word.split(), "run.id=mistaken") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("shoestring: ") and message in said
    assert not (folder / "runs" / "mistaken").exists(), "the id is free for the next try"
