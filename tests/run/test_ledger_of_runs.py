"""Where the time of runs went that were killed and went on: one ledger over all attempts, to the nanosecond."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from test_train import SMALL, rows

TRAIN = [sys.executable, "-m", "launcher.train", "data.corpus=[text.txt]", *SMALL, "verify=skip", "run.id=mine"]


def read(run: Path) -> list[dict[str, Any]]:
    """The attempts of a run, which add up."""
    attempts = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    for attempt in attempts:
        assert sum(attempt["parts"].values()) == attempt["end"] - attempt["begin"]
        assert min(attempt["parts"].values()) >= 0
    assert not (run / "ledger.open.json").exists()
    return attempts


def write_text(folder: Path) -> None:
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 900)


@pytest.mark.full
def test_a_killed_rank_is_paid_for_until_the_next_one_steps(tmp_path: Path) -> None:
    """Rank 0, which keeps the ledger, dies in the seventh step; there is a checkpoint behind the fourth or sixth."""
    write_text(tmp_path)
    words = ["parallel.dp=2", "checkpoint.every=2", "health.faults=[0:7:backward:kill]", "run.steps=9"]
    price = "cluster.price_per_device_hour=36000"
    done = subprocess.run([*TRAIN, *words, price], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs/mine"
    first, second = read(run)
    assert (first["ending"], second["ending"]) == ("killed", "finished")
    assert first["end"] == second["begin"] and first["holder"] == second["holder"]
    assert (first["highest"], first["parts"]["recomputed"], first["parts"]["restarts"]) == (6, 0, 0)
    assert second["highest"] == 9 and second["parts"]["setup"] == 0 < second["parts"]["restarts"]
    again = next(iter(rows(run, "resume")))["step"]
    taken = rows(run, "step")
    assert (second["parts"]["recomputed"] > 0) == (again < 6)
    useful = sum(row["seconds"] for row in taken if row["step"] >= 6)
    assert second["parts"]["useful"] / 1e9 + second["parts"]["checkpoints"] / 1e9 > useful
    (end,) = rows(run, "end")
    assert end["cost"] == pytest.approx(2 * 10 * (second["end"] - first["begin"]) / 1e9, rel=1e-12)
    hours = 2 * (second["end"] - first["begin"]) / 3.6e12
    shown = f"{hours:,.2f} device-hours" if hours >= 0.01 else f"{hours * 3600:.1f} device-seconds"
    assert f"{shown} in 2 attempts: useful " in done.stdout and f"\ncost {end['cost']:.2f}: useful " in done.stdout


def test_a_run_that_somebody_starts_again_is_not_paid_for_meanwhile(tmp_path: Path) -> None:
    """One process, killed in the middle, started again, interrupted, and started again."""
    write_text(tmp_path)
    words = ["checkpoint.every=2", "checkpoint.resume=auto", "run.steps=30000", "run.eval_every=0"]
    for end in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen([*TRAIN, *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while "checkpoint after step" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(process.pid, end)
        process.communicate(timeout=120)
    reached = rows(tmp_path / "runs/mine", "step")[-1]["step"]
    last = [*words, f"run.steps={reached + 3}"]
    subprocess.run([*TRAIN, *last], cwd=tmp_path, check=True, capture_output=True, timeout=240)
    attempts = read(tmp_path / "runs/mine")
    assert [attempt["ending"] for attempt in attempts] == ["killed", "interrupted", "finished"]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2, 3]
    assert all(before["end"] < after["begin"] for before, after in pairwise(attempts))
    assert len({attempt["holder"] for attempt in attempts}) == 3
    assert attempts[-1]["highest"] == attempts[-1]["next"] == reached + 3
    assert attempts[0]["parts"]["setup"] > 0 == attempts[0]["parts"]["restarts"]
    for attempt in attempts[1:]:
        assert attempt["parts"]["setup"] == 0 < attempt["parts"]["restarts"]
