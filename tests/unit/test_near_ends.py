"""Near copies of a run of one process: which are not made, and which are there when it has ended."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_run

from training import steps
from training.checkpoint import folders
from training.health.fingerprint import CorruptionError
from training.interrupt import Interrupt
from training.loop import train
from training.metrics import read
from training.setup import Setup
from training.step import run_step

CUT = 3  # the step in which something happens


class CutOffError(Exception):
    """What a run is cut off by."""


def make(text: Path, folder: Path, every: int = 100, elsewhere: Path | None = None) -> Any:
    config = make_run(text, eval_every=1)
    config.run.sample.tokens = 0
    config.checkpoint.every, config.checkpoint.minutes = every, None
    config.checkpoint.near_every, config.checkpoint.near_folder = 1, str(folder / "near")
    config.checkpoint.folder = None if elsewhere is None else str(elsewhere)
    config.health.verify_every = 1
    return config


def rows(folder: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_second", "peak_memory")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read(folder / "metrics.jsonl", "step")]


def resumed(folder: Path) -> list[int]:
    return [row["step"] for row in read(folder / "metrics.jsonl", "resume")]


def copies(folder: Path) -> list[str]:
    """The steps that there are copies of."""
    return sorted(path.parent.name for path in (folder / "near").glob("*/*/*/*.json"))


def at_cut(patch: pytest.MonkeyPatch, happen: Callable[[], object]) -> None:
    """From now on this happens before that step is taken."""

    def take(setup: Setup, step: int, *others: Any) -> Any:
        if step == CUT:
            happen()
        return run_step(setup, step, *others)

    patch.setattr(steps, "run_step", take)


def cut_off(text: Path, folder: Path, every: int = 100, elsewhere: Path | None = None) -> None:
    """Once the last copy, which is made in the background, is there."""

    def fail() -> None:
        deadline = time.monotonic() + 20
        while f"{CUT:08}" not in copies(folder):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        raise CutOffError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOffError):
        at_cut(patch, fail)
        train(make(text, folder, every, elsewhere), folder)


def interrupt(text: Path, folder: Path, every: int = 100) -> None:
    """Ctrl-C before a step is taken."""
    enter = Interrupt.__enter__

    def press(self: Interrupt) -> Interrupt:
        self.asked = True
        return enter(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupt, "__enter__", press)
        assert train(make(text, folder, every), folder).ending == "interrupted"


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(make(text, folder), folder)
    assert len(read(folder / "metrics.jsonl", "near_copy")) == 5 and not copies(folder)
    return folder


def test_what_has_changed_in_memory_is_not_copied(text: Path, whole: Path, tmp_path: Path) -> None:
    """After the sums were taken, before the copy was: the run ends by it, and goes on from the copy before."""
    evaluate, seen = steps.evaluate, list[int]()

    def spoil(setup: Setup) -> float:
        loss = evaluate(setup)
        seen.append(1)
        if len(seen) == CUT:
            setup.engine.state().chunks[0].tensor.view(-1)[0] += 1e-3
        return loss

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CorruptionError, match=f"after step {CUT},"):
        patch.setattr(steps, "evaluate", spoil)
        train(make(text, tmp_path), tmp_path)
    assert len(seen) == CUT
    train(make(text, tmp_path), tmp_path)
    assert resumed(tmp_path) == [CUT - 1] and rows(tmp_path) == rows(whole)


def test_who_goes_on_from_them_and_is_stopped_leaves_a_checkpoint(text: Path, whole: Path, tmp_path: Path) -> None:
    """Of the step that there were only copies of; they go."""
    cut_off(text, tmp_path)
    assert not folders.find(tmp_path / "checkpoints")
    interrupt(text, tmp_path)
    assert resumed(tmp_path) == [CUT] and folders.find(tmp_path / "checkpoints") == [CUT] and not copies(tmp_path)
    train(make(text, tmp_path), tmp_path)
    assert resumed(tmp_path) == [CUT, CUT] and rows(tmp_path) == rows(whole)


def test_copies_stay_where_there_is_no_checkpoint(text: Path, whole: Path, tmp_path: Path) -> None:
    """Without ``checkpoint.every`` and ``minutes`` an interrupted run has nothing else."""
    cut_off(text, tmp_path, every=0)
    interrupt(text, tmp_path, every=0)
    assert not folders.find(tmp_path / "checkpoints") and copies(tmp_path) == [f"{CUT:08}"]
    train(make(text, tmp_path, every=0), tmp_path)
    assert resumed(tmp_path) == [CUT, CUT] and rows(tmp_path) == rows(whole) and not copies(tmp_path)


def test_a_checkpoint_elsewhere_that_is_newer_is_taken(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``checkpoint.folder`` has it; copies of the same step, or of one before, are left alone."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    cut_off(text, run, 1, elsewhere)
    assert folders.find(elsewhere / "run")[-1] >= CUT - 1
    for newest in (run / "near").glob(f"*/*/{CUT:08}"):
        shutil.rmtree(newest)
    assert copies(run)[-1] == f"{CUT - 1:08}"
    train(make(text, run, 1, elsewhere), run)
    assert "near copies after" not in capsys.readouterr().out and rows(run) == rows(whole)
    assert resumed(run)[0] >= CUT - 1
