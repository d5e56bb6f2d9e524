"""Runs in this process that go on: from an older checkpoint, with other batches, or not at all."""

import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from small_models import make_config
from small_runs import make_run

from training import steps
from training.checkpoint import folders, near
from training.checkpoint.manifest import MANIFEST
from training.checkpoint.neighbour import Neighbour
from training.checkpoint.plan import load
from training.checkpoint.staging import Staged
from training.chunk import Chunk
from training.config import Precision
from training.finish import Ending
from training.interrupt import Interrupt
from training.loop import train
from training.metrics import STEPPED, read
from training.ramp import BatchSchedule, Level
from training.step import run_step


def make(text: Path, *, every: int = 2, keep: int = 9, minutes: float | None = None, **changes: Any) -> Any:
    config = make_run(text, **{"eval_every": 3, **changes})
    config.run.sample.tokens = 0
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.minutes = every, keep, minutes
    return config


def rows(folder: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_second", "peak_memory")
    found = [row for kind in STEPPED for row in read(folder / "metrics.jsonl", kind)]
    return [{k: v for k, v in row.items() if k not in clocks} for row in found]


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, with checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("whole")
    train(make(text), folder)
    assert folders.find(folder / "checkpoints") == [2, 4, 6]
    return folder


def cut_off(whole: Path, folder: Path, *kept: int) -> Path:
    """What was left of it when only these checkpoints were there: its record may be longer."""
    for step in kept:
        shutil.copytree(whole / "checkpoints" / f"{step:08}", folder / "checkpoints" / f"{step:08}")
    shutil.copy(whole / "metrics.jsonl", folder)
    return folder


@pytest.mark.parametrize("kept", [(), (2,), (2, 4), (2, 4, 6)])
def test_goes_on_with_the_same_bits(text: Path, whole: Path, tmp_path: Path, kept: tuple[int, ...]) -> None:
    cut_off(whole, tmp_path, *kept)
    summary = train(make(text), tmp_path)
    assert rows(tmp_path) == rows(whole) and summary.steps == 6 and summary.ending is Ending.finished
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl", "resume")] == list(kept[-1:])
    assert len(read(tmp_path / "metrics.jsonl", "end")) == 1
    content = [(folder / "weights" / "00001.safetensors").read_bytes() for folder in (tmp_path, whole)]
    assert content[0] == content[1]


def test_a_record_that_was_cut_off_is_mended(text: Path, whole: Path, tmp_path: Path) -> None:
    cut_off(whole, tmp_path, 4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')
    train(make(text), tmp_path)
    assert rows(tmp_path) == rows(whole)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))


def test_the_newest_good_one_is_taken(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = cut_off(whole, tmp_path, 2, 4, 6) / "checkpoints"
    flip(root / "00000006" / "00000.safetensors")
    os.truncate(root / "00000004" / "00000.safetensors", 5000)
    (root / "00000005").mkdir()
    (root / "00000005" / "00000.safetensors").write_bytes(b"half of it")
    train(make(text), tmp_path)
    shown = capsys.readouterr().out
    assert "00000005 was never completed: removed" in shown and "goes on after step 2 and 256 tokens" in shown
    for step, fault in ((6, "is damaged"), (4, "is cut short")):
        assert f"the checkpoint after step {step} cannot be loaded and is now {root}/{step:08}.damaged: rank 0" in shown
        assert fault in shown
    assert rows(tmp_path) == rows(whole)
    assert folders.find(root) == [2, 4, 6]  # 4 and 6 were made again


def test_without_a_good_one_nothing_begins_anew(text: Path, whole: Path, tmp_path: Path) -> None:
    root = cut_off(whole, tmp_path, 4) / "checkpoints"
    (root / "00000004" / MANIFEST).write_text("{}")
    for _ in range(2):  # nor the second time, when the checkpoint has been set aside
        with pytest.raises(ValueError, match=r"has no checkpoint that can be loaded, but 00000004\.damaged: see what"):
            train(make(text), tmp_path)
        assert rows(tmp_path) == rows(whole)


def test_another_models_checkpoint_is_a_mistake(text: Path, whole: Path, tmp_path: Path) -> None:
    cut_off(whole, tmp_path, 4)
    with pytest.raises(ValueError, match=r"model\.num_layers=4 must be 3, as in the checkpoint"):
        train(make(text, model=make_config(vocab_size=264, mtp=1, num_layers=4)), tmp_path)
    assert folders.find(tmp_path / "checkpoints") == [4]


@pytest.mark.parametrize("precision", [Precision.fp8, Precision.fp64])
def test_another_precision_starts_from_the_same_masters(
    text: Path, whole: Path, tmp_path: Path, precision: Precision
) -> None:
    """Those of the first are float32, of the second float64: the same numbers."""
    cut_off(whole, tmp_path, 4)
    train(make(text, steps=4, precision=precision), tmp_path)
    assert read(tmp_path / "metrics.jsonl", "resume")[0]["step"] == 4
    train(make(text, steps=5, precision=precision), tmp_path)
    found, wanted = rows(tmp_path)[4], rows(whole)[4]
    assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-2 if precision is Precision.fp8 else 1e-5)


def test_other_batches_go_on_at_the_same_token(text: Path, whole: Path, tmp_path: Path) -> None:
    """After 4 steps of 8 sequences, steps of 12."""
    cut_off(whole, tmp_path, 4)
    train(make(text, global_batch=12), tmp_path)
    assert [row["cursor"] for row in read(tmp_path / "metrics.jsonl", "step")] == [8, 16, 24, 32, 44, 56]


def test_a_finished_run_takes_further_steps(text: Path, whole: Path, tmp_path: Path) -> None:
    cut_off(whole, tmp_path, 6)
    summary = train(make(text), tmp_path)
    assert summary.steps == 6 and rows(tmp_path) == rows(whole)
    assert train(make(text, steps=8), tmp_path).steps == 8 and len(read(tmp_path / "metrics.jsonl", "step")) == 8


def test_ctrl_c_leaves_a_checkpoint(text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though none was due: by the clock, which has not struck yet."""
    entered: list[Interrupt] = []
    enter = Interrupt.__enter__

    def remember(interrupt: Interrupt) -> Interrupt:
        entered.append(interrupt)
        return enter(interrupt)

    def press(setup: Any, step: int, *others: Any) -> Any:
        entered[-1].asked = step == 3
        return run_step(setup, step, *others)

    monkeypatch.setattr(Interrupt, "__enter__", remember)
    monkeypatch.setattr(steps, "run_step", press)
    assert train(make(text, every=0, minutes=60.0), tmp_path).ending is Ending.interrupted
    assert folders.find(tmp_path / "checkpoints") == [3]
    monkeypatch.setattr(steps, "run_step", run_step)
    train(make(text, every=0, minutes=60.0), tmp_path)
    assert rows(tmp_path) == rows(whole) and folders.find(tmp_path / "checkpoints") == [3]


def test_the_clock_makes_checkpoints_too(text: Path, tmp_path: Path) -> None:
    train(make(text, every=0, minutes=1e-9, keep=2), tmp_path)
    kept = read(tmp_path / "metrics.jsonl", "checkpoint")
    found = [row["step"] for row in kept]  # none is begun while another is under way
    assert found == sorted(set(found)) and (found[0], found[-1]) == (1, 6)
    assert folders.find(tmp_path / "checkpoints") == found[-2:]
    assert all(0 < row["stall_seconds"] <= row["seconds"] and row["bytes"] > 10**5 for row in kept)


def dawdle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies are not made before somebody has waited for them for some time, or long has."""
    copy, wait, waited = Staged._copy, Staged.wait, set[Event]()

    def copy_late(staged: Staged) -> None:
        deadline = time.monotonic() + 2
        while staged.filled not in waited and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        copy(staged)

    def wait_early(staged: Staged) -> None:
        waited.add(staged.filled)
        wait(staged)

    monkeypatch.setattr(Staged, "_copy", copy_late)
    monkeypatch.setattr(Staged, "wait", wait_early)


def test_state_waits_for_its_copy(text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is made beside the next step, and here takes longer than that."""
    dawdle(monkeypatch)
    train(make(text), tmp_path)
    assert rows(tmp_path) == rows(whole)
    for step in (2, 4, 6):
        found, wanted = (folders.read_manifest(folders.locate(run / "checkpoints", step)) for run in (tmp_path, whole))
        assert found.tensors == wanted.tensors
    assert all(row["stall_seconds"] > 0.2 for row in read(tmp_path / "metrics.jsonl", "checkpoint")[:2])


def test_state_waits_for_its_near_copy(
    text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(text, every=0)
    config.checkpoint.near_every, config.checkpoint.near_folder = 2, str(tmp_path / "near")
    dawdle(monkeypatch)
    monkeypatch.setattr(Neighbour, "_discard", lambda *args: None)
    train(config, tmp_path)
    for step in (2, 4):
        wanted = folders.read_manifest(folders.locate(whole / "checkpoints", step)).tensors
        (place,) = tmp_path.glob(f"near/*/*/{step:08}")
        found = near.read_manifest(place, 0).tensors
        assert found.keys() == wanted.keys()
        for name, stored in wanted.items():
            assert [piece.sha256 for piece in found[name].pieces] == [piece.sha256 for piece in stored.pieces], name
    assert all(row["stall_seconds"] > 0.2 for row in read(tmp_path / "metrics.jsonl", "near_copy"))


def test_a_run_that_asks_for_none_has_none(text: Path, tmp_path: Path) -> None:
    train(make(text, every=0), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_full_disk_does_not_end_a_run(
    text: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second of three checkpoints finds no room."""
    (tmp_path / "checkpoints" / "00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / "00000004" / MANIFEST).write_text("{}")  # is there: not swept
    (tmp_path / "checkpoints" / "00000004" / "00000.safetensors").symlink_to("/dev/full")
    (tmp_path / "checkpoints" / "00000004").rename(tmp_path / "full")
    made = folders.locate

    def locate(root: Path, step: int) -> Path:
        return tmp_path / "full" if step == 4 else made(root, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "locate", locate)
        assert train(make(text), tmp_path).ending is Ending.finished
    shown = capsys.readouterr().out
    assert "no checkpoint after step 4: rank 0: [Errno 28] No space left on device, while writing" in shown
    (failed,) = read(tmp_path / "metrics.jsonl", "checkpoint_failed")
    assert failed["step"] == 4 and folders.find(tmp_path / "checkpoints") == [2, 6] and not (tmp_path / "full").exists()
    assert rows(tmp_path) == rows(whole)


def test_a_place_that_takes_no_files_does_not_end_a_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert train(make(text, steps=2), tmp_path).ending is Ending.finished
    assert "no checkpoint after step 2: rank 0: [Errno 20] Not a directory" in capsys.readouterr().out


def test_a_ramp_goes_on_where_it_was() -> None:
    ramp = BatchSchedule((Level(0, 0, 4), Level(3, 12, 8), Level(5, 28, 12)))
    assert ramp.resume(4, 20) is ramp
    moved = ramp.resume(10, 20)  # came here in smaller steps
    assert [moved.size(step) for step in (10, 11, 12)] == [8, 12, 12]
    assert [moved.before(step) for step in (10, 11, 12)] == [20, 28, 40]
    early = ramp.resume(1, 6)
    assert [early.size(step) for step in range(1, 7)] == [4, 4, 8, 8, 12, 12] and early.before(5) == 30


def test_the_record_counts_nothing_twice(text: Path, whole: Path, tmp_path: Path) -> None:
    cut_off(whole, tmp_path, 2)
    train(make(text), tmp_path)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert kinds.count("step") == 6 and kinds.count("eval") == 2 and kinds.count("end") == 1
    assert torch.get_num_threads() == 1


def test_the_page_reads_what_a_run_writes(whole: Path) -> None:
    """The reader of docs/checkpoint-format.md, which knows nothing of ours, against torch; and its table of facts."""
    page = (Path(__file__).parents[2] / "docs" / "checkpoint-format.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    space: dict[str, Any] = {}
    exec(code, space)  # noqa: S102
    folder = whole / "checkpoints" / "00000004"
    manifest = folders.read_manifest(folder)
    for name, stored in manifest.tensors.items():
        found = torch.zeros(stored.shape, dtype=getattr(torch, stored.dtype))
        load(folder, manifest, [Chunk(name, stored.shape, (0,) * len(stored.shape), found)])
        assert torch.equal(torch.from_numpy(space["read"](folder, name)), found), name
    assert not [key for key in manifest.run if f"`{key}`" not in page]
    kinds = {name.partition("/")[0] for name in manifest.tensors}
    assert kinds == {"master", "m", "v", "buffer", "rng"} and all(f"`{kind}/<" in page for kind in kinds)


def test_skipped_steps_are_counted_on(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are allowed to follow each other: the third ends the run, though it is the first since the run went on."""

    def spoil(setup: Any, step: int, *others: Any) -> Any:
        row = run_step(setup, step, *others)
        assert row is not None
        return replace(row, skipped=step >= 1)

    monkeypatch.setattr(steps, "run_step", spoil)
    optimizer = {"skip_limit": 2}
    assert train(make(text, steps=3, every=1, optimizer=optimizer), tmp_path).ending is Ending.finished
    summary = train(make(text, every=1, optimizer=optimizer), tmp_path)
    assert summary.ending is Ending.diverged and summary.steps == 4
