"""A run that is killed goes on by ``checkpoint.resume=auto``: no step is missing, none is there twice, all bits are the
same."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_train import SMALL

WORDS = ["data.corpus=[text.txt]", *SMALL, "precision=bf16", "verify=skip", "run.steps=32", "run.eval_every=15"]
WORDS += ["checkpoint.every=4", "checkpoint.minutes=null"]
ENDS = ("killed", "whole")
RANKS = {"one process": [], "two ranks": ["parallel.dp=2", "parallel.ep=2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} foxes jump over {i % 7} dogs\n" for i in range(900)))
    return folder


def start(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "launcher.train", *WORDS, *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, *words: str, code: int = 0) -> str:
    process = start(folder, *words)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def rows(run: Path) -> list[dict[str, Any]]:
    """Steps and evaluations, without what a clock says; whole lines only."""
    clocks = ("seconds", "tokens_per_second", "peak_memory")
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in clocks} for row in found if row["kind"] in ("step", "eval")]


def kill(process: "subprocess.Popen[str]", run: Path, at: int) -> None:
    """SIGKILL, to rank 1 where there are several, as soon as a step is recorded."""
    deadline = time.monotonic() + 90
    while not any(row["step"] >= at for row in rows(run)):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    ranks = []
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            ranks.append(int(pid))
    os.kill(ranks[0] if ranks else process.pid, signal.SIGKILL)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", ["one process", pytest.param("two ranks", marks=pytest.mark.full)])
def test_a_killed_run_goes_on(folder: Path, ranks: str) -> None:
    layout, name = RANKS[ranks], ranks.replace(" ", "-")
    finish(folder, *layout, f"run.id={name}-whole")
    whole = rows(folder / "runs" / f"{name}-whole")
    assert len([row for row in whole if row["kind"] == "step"]) == 32
    run = folder / "runs" / f"{name}-killed"
    for at in (9, 20) if layout else (9,):
        process = start(folder, *layout, f"run.id={run.name}", "checkpoint.resume=auto", "run.restarts=0")
        kill(process, run, at)
        said = process.communicate(timeout=240)[0]
        assert not layout or "not started again: run.restarts=0" in said
        assert max(row["step"] for row in rows(run)) < 31
    said = finish(folder, *layout, f"run.id={run.name}", "checkpoint.resume=auto")
    assert "goes on after step" in said and "finished after 32 of 32 steps" in said
    assert rows(run) == whole
    found, expected = (folder / "runs" / f"{name}-{end}" / "weights" / "00001.safetensors" for end in ENDS)
    assert found.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in (run / "before").iterdir()) == ["1", "2"][: 1 + bool(layout)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["00000028", "00000032"]
    show = [sys.executable, "-m", "launcher.checkpoint", "verify", str(run)]
    done = subprocess.run(show, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.count("all as written") == 2, done


@pytest.mark.full
@pytest.mark.timeout(600)
def test_torchrun_starts_them_again(folder: Path) -> None:
    """One of its ranks is killed, and all come back as what they were: its store remembers those before them."""
    layout = RANKS["two ranks"]
    finish(folder, *layout, "run.id=unheard")
    run, torchrun = folder / "runs" / "heard", [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1"]
    command = [*torchrun, "--nproc-per-node", "2", "-m", "launcher.train", *WORDS, *layout]
    command += ["run.id=heard", "checkpoint.resume=auto"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    kill(process, run, 9)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "goes on after step" in said, said
    assert rows(run) == rows(folder / "runs" / "unheard")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_near_copies_are_enough(folder: Path, tmp_path: Path) -> None:
    """No checkpoint, and one of two ranks is killed: what it had left in memory is what both go on from."""
    words = [*RANKS["two ranks"], "checkpoint.every=0"]
    finish(folder, *words, "run.id=far")
    run, copies = folder / "runs" / "near", ("checkpoint.near_every=1", f"checkpoint.near_folder={tmp_path}")
    process = start(folder, *words, *copies, "run.id=near", "run.restarts=1")
    kill(process, run, 9)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and not (run / "checkpoints").exists(), said
    assert "starting again from the beginning, or from near copies after step " in said
    assert int(re.search(r"near copies after step (\d+) are taken", said)[1]) >= 8
    assert rows(run) == rows(folder / "runs" / "far") and not list(tmp_path.iterdir())


def test_a_run_that_is_there_is_not_overwritten(folder: Path) -> None:
    (folder / "runs" / "taken").mkdir(parents=True)
    assert "or go on with that run by checkpoint.resume=auto" in finish(folder, "run.id=taken", code=2)
