"""Which checkpoints are kept, and when the next one is due."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_run

from training import steps
from training.checkpoint import folders
from training.checkpoint.interval import choose_interval
from training.config import CheckpointConfig
from training.loop import train
from training.metrics import read


def make(text: Path, **changes: Any) -> Any:
    config = make_run(text, eval_every=1, steps=6)
    config.run.sample.tokens, config.checkpoint.minutes = 0, None
    for name, value in changes.items():
        setattr(config.checkpoint, name, value)
    return config


def script(patch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """From now on evaluations find these."""
    coming = iter(losses)
    patch.setattr(steps, "evaluate", lambda setup: next(coming))


def test_the_best_evaluations_make_checkpoints_that_stay(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(monkeypatch, [3.0, 2.0, math.nan, 2.5, 1.0, 4.0])
    train(make(text, keep_best=2, keep=1), tmp_path)
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl", "checkpoint")] == [1, 2, 4, 5]
    assert folders.find(tmp_path / "checkpoints") == [2, 5]
    newest = folders.read_manifest(tmp_path / "checkpoints" / "00000005")
    assert newest.run["best"] == [[1.0, 5], [2.0, 2]]


def test_a_run_that_goes_on_knows_the_best(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, then = tmp_path / "first", tmp_path / "then"
    first.mkdir()
    script(monkeypatch, [2.0, 3.0, 1.0, 2.5, 2.4, 2.3])
    train(make(text, keep_best=2, keep=1), first)
    assert folders.find(first / "checkpoints") == [1, 3]
    then.mkdir()
    shutil.copytree(first / "checkpoints", then / "checkpoints")
    shutil.copy(first / "metrics.jsonl", then)
    script(monkeypatch, [2.5, 1.5, 2.3])
    train(make(text, keep_best=2, keep=1), then)
    assert folders.find(then / "checkpoints") == [3, 5]


def test_one_that_could_not_be_written_is_not_the_best(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    script(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    train(make(text, keep_best=1), tmp_path)
    failed = [row["step"] for row in read(tmp_path / "metrics.jsonl", "checkpoint_failed")]
    assert failed[0] == 1 and len(failed) > 1


def test_an_evaluation_is_recorded_before_the_checkpoint_behind_it(text: Path, tmp_path: Path) -> None:
    """So a run that goes on from there has its row."""
    train(make(text, every=3), tmp_path)
    kinds = [line.split('"')[3] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.index("checkpoint") > [n for n, kind in enumerate(kinds) if kind == "eval"][2]
    assert len(read(tmp_path / "metrics.jsonl", "eval")) == 6


def test_the_interval_is_the_one_that_loses_least() -> None:
    stall, failure = 2.0, 10_000.0

    def lost(interval: float) -> float:
        return stall / interval + interval / (2 * failure)

    best = choose_interval(stall, 0.0, failure)
    assert best == pytest.approx(200) and all(lost(best) < lost(other) for other in (best - 5, best + 5))
    assert choose_interval(stall, 700.0, failure) == 700.0, "none begins before the last one is there"


def test_the_interval_follows_from_what_a_checkpoint_costs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first one: a device that holds for ages needs no second, one that fails at once needs all."""
    for name, hours in (("ages", 1e9), ("moments", 1e-12)):
        (tmp_path / name).mkdir()
        train(make(text, minutes=1e-9, auto=True, device_hours=hours), tmp_path / name)
        shown = capsys.readouterr().out
        made = read(tmp_path / name / "metrics.jsonl", "checkpoint")
        first = next(line for line in shown.splitlines() if line.startswith("checkpoint after step 1:"))
        seconds = float(first.rpartition("; the next one in ")[2].removesuffix(" s"))
        wanted = choose_interval(made[0]["stall_seconds"], made[0]["seconds"], 3600 * hours)
        assert seconds == pytest.approx(wanted, abs=0.06)
        assert len(made) == 2 or name == "moments", "the first, and the end"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep_best": -1}, "checkpoint.keep_best=-1 must not be negative"),
        ({"auto": True, "minutes": None}, "checkpoint.minutes=null must be what the first checkpoint waits for"),
        ({"device_hours": 0.0}, "checkpoint.device_hours=0.0 must be positive"),
    ],
)
def test_values_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^checkpoint\.") as caught:
        CheckpointConfig(**keys)
    assert message in str(caught.value)
