"""What the page of a run is drawn from: a record read line by line, series made short, axes, colours of maps."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_metrics import row

from launcher.page.maps import draw_experts, draw_violations
from launcher.page.read import FIELDS, Cut, Loads, measure_violation, read_record
from launcher.page.scale import (
    Scale,
    list_even,
    list_steps,
    span_values,
    write_bytes,
    write_number,
    write_prefix,
    write_ticks,
)
from launcher.page.thin import COLUMNS, smooth, spot, squeeze, thin
from model.statistics import measure_balance
from training.metrics import Record


def write_record(path: Path, **changes: Any) -> Path:
    """Five steps as training writes them, the third without a finite loss, the fourth skipped."""
    with Record(path) as record:
        record.write("start", threads=1)
        for step in range(5):
            odd = {2: {"loss": math.nan}, 3: {"skipped": True}}.get(step, {})
            record.write_step(row(step, **{"loss": 4.0 - step / 3, "lr": 1e-5 * step, **odd, **changes}))
    return path


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = read_record(write_record(tmp_path / "metrics.jsonl"))
    assert record.steps.tolist() == [1, 2, 3, 4, 5] and record.left_out == 0
    wanted = [4.0, 4.0 - 1 / 3, math.nan, math.nan, 4.0 - 4 / 3]
    assert record.series["loss"].tolist() == pytest.approx(wanted, rel=1e-15, nan_ok=True)
    assert record.series["lr"].tolist() == [1e-5 * step for step in range(5)]
    assert record.series["grad_norm"].tolist() == pytest.approx([0.5, 0.5, 0.5, math.nan, 0.5], nan_ok=True)
    assert record.series["skipped"].tolist() == [0, 0, 0, 1, 0] and record.last("peak_memory") == 1 << 20


def test_lines_that_are_cut_say_the_same_as_lines_that_are_parsed(tmp_path: Path) -> None:
    """However they are laid out: nothing is cut but what differs from a parsed line in its numbers alone."""
    path = write_record(tmp_path / "metrics.jsonl")
    first = read_record(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for layout in (
        {"separators": (",", ":")},
        {"sort_keys": True},
        {"indent": 0},
    ):
        lines = [json.dumps(each, **layout).replace("\n", " ") for each in rows]  # type: ignore[arg-type]
        path.write_text("\n".join(lines) + "\n")
        other = read_record(path)
        assert all(np.array_equal(first.series[name], other.series[name], equal_nan=True) for name in FIELDS)
    line = (json.dumps({"kind": "step", **{name: 1 for name in FIELDS[:-1]}, "skipped": False}) + "\n").encode()
    cut = Cut.like(line, json.loads(line))
    assert cut is not None and cut.read(line) == [1.0] * (len(FIELDS) - 1) + [0.0]
    assert cut.read(line.replace(b'"lr": 1', b'"lr": -2.5e-07')) is not None
    for change in ((b'"lr": 1', b'"lr": null'), (b"false", b"true"), (b'"lr"', b'"rl"'), (b'"lr": 1', b'"lr": 1.2.3')):
        assert cut.read(line.replace(*change)) is None, change


def test_of_steps_that_come_twice_the_last_counts(tmp_path: Path) -> None:
    with Record(tmp_path / "metrics.jsonl") as record:
        for step, loss in ((0, 5.0), (1, 4.0), (2, 3.0), (1, 9.0)):
            record.write_step(row(step, loss=loss))
    found = read_record(tmp_path / "metrics.jsonl")
    assert found.steps.tolist() == [1, 2, 3] and found.series["loss"].tolist() == [5, 9, 3]


def test_violations_are_the_models_own() -> None:
    counts = np.array([[5, 3, 0, 4], [0, 0, 0, 0], [2, 2, 2, 2]], dtype=np.float64)
    wanted = measure_balance(torch.from_numpy(counts).long()).max_violation.tolist()
    assert measure_violation(counts).tolist() == wanted == pytest.approx([2 / 3, 0, 0])


def test_a_long_series_keeps_its_extremes() -> None:
    steps = np.arange(1.0, 1_000_001)
    values = np.sin(steps / 7e4)
    values[123_456], values[777_777], values[500_000:503_000] = 40.0, -30.0, np.nan
    pieces = thin(steps, values, (1.0, 1e6))
    points = np.concatenate(pieces)
    assert len(points) <= 2 * COLUMNS and len(pieces) == 2, "a gap as wide as a column is one"
    assert [123_457, 40.0] in points.tolist() and [777_778, -30.0] in points.tolist()
    assert (np.diff(points[:, 0]) > 0).all()
    columns = spot(steps, (1.0, 1e6))
    for column in (0, 17, COLUMNS - 1):
        inside, kept = values[columns == column], points[spot(points[:, 0], (1.0, 1e6)) == column][:, 1]
        assert (kept.min(), kept.max()) == (inside.min(), inside.max())


def test_a_short_series_is_kept_whole() -> None:
    values = np.array([1.0, 2.0, math.nan, 4.0, math.nan, math.nan, 7.0])
    pieces = thin(np.arange(1.0, 8), values, (1.0, 7.0))
    assert [piece.tolist() for piece in pieces] == [[[1, 1], [2, 2]], [[4, 4]], [[7, 7]]]
    assert thin(np.arange(3.0), np.full(3, math.nan), (0.0, 2.0)) == [] == thin(np.empty(0), np.empty(0), (1.0, 1.0))


def test_means_are_of_the_last_steps() -> None:
    values = np.arange(100.0)
    found = smooth(values, 10)
    assert found[99] == values[90:].mean() and found[39] == values[30:40].mean()
    assert found[7] == values[6:8].mean() and found[0] == 0, "of few at the beginning"
    values[95] = math.nan
    found = smooth(values, 10)
    assert math.isnan(found[95]) and found[99] == np.nanmean(values[90:])


def test_a_table_is_made_narrow_by_what_is_farthest() -> None:
    table = np.array([[0.0, 1, 5, 2, 1, 1], [1, 1, 1, 0, 2, 1]])
    assert squeeze(table, 3, usual=1.0).tolist() == [[0, 5, 1], [1, 0, 2]] and squeeze(table, 6) is table


@pytest.mark.parametrize(
    ("ticks", "words"),
    [
        ([0, 5000, 10000], ["0", "5k", "10k"]),
        ([0, 2e6, 4e6], ["0", "2M", "4M"]),
        ([0.0, 0.5, 1.0, 1.5], ["0", "0.5", "1.0", "1.5"]),
        ([0, 5e-5, 1e-4, 1.5e-4], ["0", "5e-5", "1e-4", "1.5e-4"]),
        ([1000, 2000], ["1,000", "2,000"]),
        ([0, 0.001, 0.002], ["0", "0.001", "0.002"]),
        ([2.0, 2.25, 2.5], ["2.00", "2.25", "2.50"]),
    ],
)
def test_marks_are_short(ticks: list[float], words: list[str]) -> None:
    assert write_ticks(ticks) == words


def test_axes_hold_what_they_are_for() -> None:
    for low, high in ((1.9, 5.5), (0, 1), (-3, 12345), (1e-9, 3e-9), (7, 7), (0, 0), (-2, -2)):
        scale = span_values(np.array([low, math.nan, high], dtype=np.float64))
        places = scale.place(np.array([low, high], dtype=np.float64))
        assert ((places >= -1e-9) & (places <= 1 + 1e-9)).all() and 2 <= len(scale.ticks()) <= 8, (low, high)
    assert span_values(np.array([3.0, 5.0]), zero=True).low == 0 and span_values(np.array([])) == Scale(0.0, 1.0)
    assert (
        not span_values(np.array([1.0, 20.0]), log=True).log and not span_values(np.array([0.0, 900.0]), log=True).log
    )
    wide = span_values(np.array([0.01, 900.0]), log=True)
    assert wide.log and wide.ticks() == pytest.approx([0.01, 0.1, 1, 10, 100, 1000])
    assert span_values(np.array([0.0, 2.0]), zero=True, whole=True).ticks() == [0, 1, 2]
    assert list_even(0, 10) == [0, 2, 4, 6, 8, 10] and list_steps(1, 3) == [1, 2, 3] and list_steps(4, 4) == [4]


def test_numbers_are_for_people() -> None:
    assert [write_number(each) for each in (2.13456, 12345.6, 3.2e-5, 7.0, math.nan)] == [
        "2.135",
        "12,346",
        "3.2e-05",
        "7",
        "–",
    ]
    assert [write_prefix(each) for each in (671026419200, 2.34e6, 8192, math.nan)] == ["671 B", "2.34 M", "8,192", "–"]
    assert [write_bytes(each) for each in (3 << 30, 5 << 20)] == ["3.00 GiB", "5 MiB"]


def cells(svg: str, kind: str) -> dict[tuple[float, float], float]:
    """Of a class, the cells (x, y) and how wide each is."""
    d = next((part.split('"')[0] for part in svg.split(f'<path class="{kind}" d="')[1:]), "")
    found = {}
    for part in d.split("M")[1:]:
        place, _, rest = part.partition("h")
        x, y = map(float, place.split())
        found[x, y] = float(rest.split("v")[0])
    return found


def test_maps_colour_what_was_counted() -> None:
    """Layers down; dead experts and hot ones in colours of their own, equal neighbours in one rectangle."""
    counts = np.array([[100, 100, 100, 100], [0, 400, 0, 0]], dtype=np.float64)
    loads = Loads(np.array([1, 5, 9]), np.array([[0.05, 3.0], [0.05, 3.0], [1.5, 3.0]]), counts)
    experts = draw_experts(loads, ["1", "2"])
    assert cells(experts, "r4") == {(0, 0): 1000} and cells(experts, "r7") == {(250, 100): 250}
    assert cells(experts, "r0") == {(0, 100): 250, (500, 100): 500} and "Load of each expert in step 9" in experts
    assert "layer 2: expert 1 has most, 4 times the mean; expert 0 least, 0; 3 without a token" in experts
    violations = draw_violations(loads, ["1", "2"], (1.0, 9.0))
    assert cells(violations, "m0") == {(0, 0): 750} and cells(violations, "m4") == {(750, 0): 250}
    assert cells(violations, "m5") == {(0, 100): 1000} and "layer 1: 1.5 at last, at most 1.5 in step 9" in violations
