"""Pages of runs that are cut off, empty, strange or large: a page comes of each, and says what is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_parsed import Page, check_closed, points
from page_runs import attempt, large, make_run, start, step

Report = Callable[..., str]


@pytest.mark.parametrize("record", ["", "\n", "[1]\nnonsense\n", '{"kind": "step", "st', '{"kind": "start"}\n'])
def test_a_record_with_nothing_in_it(record: str, report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(record)
    found = Page(report(run))
    assert "The record has no step yet." in found.text and "not begun: tiny" in found.text
    assert ("2 lines of the record could not be read" in found.text) == record.startswith("[1]")


def test_no_record_at_all(report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    (run / "metrics.jsonl").unlink()
    assert "The record has no step yet." in report(run)


def test_a_run_that_was_killed(report: Report, tmp_path: Path) -> None:
    """Its record ends within a line, its last attempt is still open."""
    run = make_run(tmp_path / "run", [start(), *map(step, range(12))])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(step(12))[:100])
    (run / "ledger.jsonl").write_text(json.dumps(attempt(1, "killed", 0.0, useful=60, setup=20)) + "\n")
    (run / "ledger.open.json").write_text(json.dumps(attempt(2, "killed", 0.0, restarts=20)))
    found = Page(report(run))
    assert "12" in found.text and "silent: tiny" in found.text and "could not be read" not in found.text
    assert "attempt 1, killed: 0.04 device-hours" in found.text
    assert "attempt 2, not closed: 0.01 device-hours" in found.text
    assert found.row("restarts")[:2] == ["40.00", "20.0%"] and found.row("all")[0] == "200.00"
    assert "cost" not in found.text, "nobody has said what it costs"
    assert json.loads((run / "ledger.open.json").read_text())["attempt"] == 2, "and nothing has been changed"


def test_restarts_and_skipped_steps_are_marked(report: Report, tmp_path: Path) -> None:
    bad = {"loss": None, "grad_norm": None, "skipped": True}
    kept = [step(number, **(bad if number in (5, 6, 15) else {})) for number in range(30)]
    again = [{"kind": "resume", "step": 20, "tokens": 7}, start(ranks=4), {"kind": "retry", "step": 25}]
    found = Page(report(make_run(tmp_path / "run", [start(), *kept[:20], *again, *kept[20:]])))
    for chart in ("Loss, nats", "Gradient norm"):
        pieces = points(found.path("line a raw", chart)[0])
        assert [len(piece) for piece in pieces] == [5, 8, 14], "a gap where nothing was finite"
    assert [len(each) for each in points(found.path("line a", "Learning rate")[0])] == [30]
    assert found.path("skipped", "Loss, nats")[0].count("M") == 3
    assert "went on with step 21" in found.titles and len(found.path("restart", "Loss, nats")) == 1
    assert found.row("6")[0] == "steps 6 to 7 were skipped: loss or gradient were not finite"
    assert found.row("16")[0].startswith("step 16 was skipped") and found.row("21") == ["went on with step 21"]
    assert "step 26 was taken again" in found.row("26")[0] and "4 ranks" in found.text
    assert found.row("loss, nats a token")[0] == f"{kept[-1]['loss']:.4f}"


def test_a_spike_of_one_step_is_seen_in_thousands(report: Report, tmp_path: Path) -> None:
    rows = [step(number, loss=2.0 if number != 7001 else 9.5) for number in range(12_000)]
    text = report(make_run(tmp_path / "run", [start(), *rows]))
    found = Page(text)
    (piece,) = points(found.path("line a raw", "Loss, nats")[0])
    highest = min(piece, key=lambda point: point[1])
    assert len(piece) <= 1200 and highest[0] == pytest.approx(1000 * 7001 / 11999, abs=2)
    assert highest[1] < 30 < 300 < sorted(y for _, y in piece)[1], "nothing else is as high"
    assert found.row("loss, nats a token")[3] == "9.5000" and len(text) < 400_000
    assert "Curves of 12,000 steps show the least and the largest in each of 600 columns." in found.text


def test_a_large_run_has_a_small_page(report: Report, tmp_path: Path) -> None:
    text = report(large(tmp_path / "run"))
    check_closed(text)
    found = Page(text)
    assert len(text) < 1_200_000 and "Of 19 attempts the last 12 have a bar each." in found.text
    assert any(
        title.startswith("layer 58: expert 0 has most") and "1 without a token" in title for title in found.titles
    )


def test_a_schedule_too_large_is_left_out(report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    (run / "schedule.svg").write_bytes(b"x" * 2_000_000)
    found = Page(report(run))
    assert "schedule.svg, is too large for this page: 2 MiB" in found.text and "bubble 25.0% of a step" in found.text


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"sets": 3}', '{"sets": {"a": {"loss": null}}}', '{"sets": {"a": 1}}']
)
def test_an_evaluation_that_is_none_is_left_out(content: str, report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    (run / "evaluations" / "one").mkdir(parents=True)
    (run / "evaluations" / "one" / "result.json").write_text(content)
    assert "Evaluations" not in report(run)


def test_evaluations_are_listed(report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    scores = {"wiki": {"loss": 1.92014, "bits_per_byte": 2.7704, "labels": 19968, "tokens": 1066082}}
    for name, average in (("20261201-110402", False), ("20261201-110402-2", True)):
        (run / "evaluations" / name).mkdir(parents=True)
        result = {"checkpoint": "c", "step": 300, "average": average, "precision": "bf16", "sets": scores}
        (run / "evaluations" / name / "result.json").write_text(json.dumps(result))
    found, wanted = Page(report(run)), ["wiki", "300", "1.9201", "2.7704", "19,968"]
    assert found.row("20261201-110402") == found.row("20261201-110402-2, averaged weights") == wanted


def test_tasks_are_listed(report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    (run / "evaluations" / "one").mkdir(parents=True)
    tasks = {"arc": {"acc,none": 0.25, "sample_len": 8.0, "alias": "x"}, "none": 3}
    (run / "evaluations" / "one" / "result.json").write_text(json.dumps({"step": 20, "tasks": tasks}))
    found = Page(report(run))
    assert found.row("one") == ["arc", "20", "acc", "0.2500"] and "sample_len" not in found.text


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense", json.dumps({**attempt(1, "x", 0.0), "parts": {}})])
def test_a_ledger_that_is_none_is_left_out(line: str, report: Report, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [start(), step(0)])
    (run / "ledger.jsonl").write_text(line + "\n")
    assert "Where the time" not in report(run)


def test_a_series_of_anything(report: Report, tmp_path: Path) -> None:
    """What is no number is no point; what is of another shape is no load."""
    strange: list[dict[str, Any]] = [
        step(0, loss="3", lr=None, grad_norm=[1], seconds={}, peak_memory="x"),
        {"kind": "step"},
        {"kind": "step", "step": "1"},
        step(2, loss=10**400, tokens_per_second=1e300),
        {"kind": "load", "step": 2, "load": [[1, 2], [3]]},
        {"kind": "load", "step": 2, "load": [[1, -2]]},
        {"kind": "load", "step": None, "load": None},
        {"kind": "eval", "step": 2, "loss": None},
        {"kind": ["x"], "step": 3},
        step(3),
    ]
    found = Page(report(make_run(tmp_path / "run", strange)))
    assert found.row("loss, nats a token") == ["2.7500"] * 4 and found.row("seconds a step")[0] == "0.25"
    assert "The record has no loads of single experts." in found.text
