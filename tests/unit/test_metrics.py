"""The record of a run: whole lines as they happen, and the same rows in the sinks that are asked for."""

import importlib.util
import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from training.config import Sink
from training.metrics import LOADS, Record, StepRow, read, shows_load
from training.sinks import open_record, open_sinks, scalars


def row(step: int = 0, **changes: Any) -> StepRow:
    values: dict[str, Any] = {
        "step": step,
        "loss": 2.5,
        "mtp_losses": (2.75,),
        "aux": 1.0,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "clip_factor": 1.0,
        "tokens": 512,
        "cursor": 8 * (step + 1),
        "seconds": 0.25,
        "tokens_per_second": 2048.0,
        "violation_worst": 0.5,
        "violation_mean": 0.25,
        "dead_experts": 0,
        "moved_experts": 0,
        "nodes_touched": 1.5,
        "bytes_inside": 1024,
        "bytes_across": 512,
        "skipped": False,
        "peak_memory": 1 << 20,
    }
    return StepRow(**{**values, **changes})


class Kept:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.closed = False

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def test_rows_come_back(tmp_path: Path) -> None:
    path, sink = tmp_path / "metrics.jsonl", Kept()
    with Record(path, [sink]) as record:
        record.write("start", threads=2)
        record.write_step(row(0))
        record.write("eval", step=0, loss=2.25)
        record.write_step(row(1, loss=2.0))
    assert [found["loss"] for found in read(path, "step")] == [2.5, 2.0]
    assert read(path, "eval") == [{"kind": "eval", "step": 0, "loss": 2.25}]
    assert [found["kind"] for found in sink.rows] == ["start", "step", "eval", "step"] and sink.closed


def test_a_row_is_on_disk_when_its_step_is_over(tmp_path: Path) -> None:
    """A process that dies without any clean-up has lost nothing."""
    path = tmp_path / "metrics.jsonl"
    child = os.fork()
    if child == 0:
        record = Record(path)
        record.write_step(row(0))
        record.write_step(row(1))
        os._exit(1)
    os.waitpid(child, 0)
    assert [found["step"] for found in read(path, "step")] == [0, 1]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Record(path) as record:
        record.write_step(row(loss=math.nan, grad_norm=math.inf, mtp_losses=(math.nan, 1.0), skipped=True))
    (found,) = read(path, "step")
    assert found["loss"] is None and found["grad_norm"] is None and found["mtp_losses"] == [None, 1.0]
    assert "NaN" not in path.read_text()


def test_loads_are_a_row_before_their_steps(tmp_path: Path) -> None:
    """So that whoever reads the last lines finds a step there, however large its loads are."""
    path, sink = tmp_path / "metrics.jsonl", Kept()
    with Record(path, [sink]) as record:
        record.write_step(row(0, load=((3, 5), (8, 0))))
        record.write_step(row(1))
    assert [(found["kind"], found["step"]) for found in sink.rows] == [("load", 0), ("step", 0), ("step", 1)]
    assert read(path, "load") == [{"kind": "load", "step": 0, "load": [[3, 5], [8, 0]]}]
    assert not any("load" in found for found in read(path, "step"))


@pytest.mark.parametrize("steps", [1, 2, 199, 200, 201, 300, 4000, 243_261, 10**6])
def test_loads_are_recorded_a_few_hundred_times(steps: int) -> None:
    shown = [step for step in range(steps) if shows_load(step, steps)]
    assert shown[0] == 0 and shown[-1] == steps - 1 and min(steps, LOADS) / 2 <= len(shown) <= LOADS + 1
    assert len({after - before for before, after in pairwise(shown[:-1])}) <= 1, "at equal distances"


def test_a_record_that_goes_back_forgets_loads_as_it_does_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Record(path) as record:
        for step in range(4):
            record.write_step(row(step, load=((step, 5),)))
    with Record(path) as record:
        record.rewind(2)
        record.write_step(row(2, load=((7, 7),)))
    assert [found["load"] for found in read(path, "load")] == [[[0, 5]], [[1, 5]], [[7, 7]]]
    assert [found["step"] for found in read(path, "step")] == [0, 1, 2]


def test_sinks_get_numbers_by_name() -> None:
    found = scalars({"kind": "step", "step": 3, "loss": 2.0, "mtp_losses": (2.5, 3.0), "skipped": True})
    assert found == {"step/loss": 2.0, "step/mtp_losses/0": 2.5, "step/mtp_losses/1": 3.0, "step/skipped": 1.0}
    assert scalars({"kind": "start", "threads": 2}) == {}


@pytest.mark.parametrize("sink", Sink)
def test_a_missing_package_is_named_with_its_extra(sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == sink.value else present(name))
    with pytest.raises(ValueError, match=rf"run\.sinks: {sink}.*pip install 'shoestring\[{sink}\]'"):
        open_sinks([sink], tmp_path)


def test_tensorboard_shows_a_step_once(tmp_path: Path) -> None:
    """A run of four steps goes on from the second: what its files had behind it is hidden."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for begun, losses in ((0, [5.0, 4.0, 3.0, 2.0]), (2, [3.5, 2.5])):
        with open_record([Sink.tensorboard], tmp_path) as record:
            record.rewind(begun)
            record.write("start", threads=1)
            for step, loss in enumerate(losses, start=begun):
                record.write_step(row(step=step, loss=loss))
            record.write("eval", step=begun + 1, loss=9.0)
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in found.Scalars("step/loss")]
    assert shown == [(0, 5.0), (1, 4.0), (2, 3.5), (3, 2.5)]
    assert [(event.step, event.value) for event in found.Scalars("eval/loss")] == [(1, 9.0), (3, 9.0)]


def test_weights_and_biases_go_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for begun in (0, 1):
        with open_record([Sink.wandb], tmp_path) as record:
            record.rewind(begun)
            record.write("start", threads=1 + begun)
            record.write_step(row(step=begun))
    files = [path.name for path in (tmp_path / "wandb").rglob("run-*.wandb")]
    assert len(files) == 2 and set(files) == {f"run-{(tmp_path / 'wandb-id.txt').read_text()}.wandb"}


def test_lines_are_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Record(path) as record:
        record.write_step(row())
    assert all(json.loads(line)["kind"] == "step" for line in path.read_text().splitlines())
