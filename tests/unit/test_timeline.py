"""``profile.steps``: what it takes, and what is made of what torch's profiler has seen."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from small_runs import make_run, write_text

from model.mark import NOTHING, mark
from training.config import ProfileConfig
from training.loop import train
from training.metrics import read
from training.timeline import Piece, Range, Seen, _innermost, find_peak, list_events, look, thin


@pytest.mark.parametrize(
    ("words", "steps"),
    [(None, []), ("4", [3]), ("2-2", [1]), ("3-5", [2, 3, 4])],
    ids=["none", "one", "two", "several"],
)
def test_steps_are_numbered_as_a_run_prints_them(words: str | None, steps: list[int]) -> None:
    assert list(ProfileConfig(steps=words).range()) == steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("5-3", "profile.steps=5-3 must not end before it begins: take 3-5"),
        ("0", "profile.steps=0 must begin at 1 or later"),
        ("2:4", "profile.steps=2:4 must be a step or a range of them, such as 4 or 3-5"),
        ("-3", "profile.steps=-3 must be a step"),
        ("²", "must be a step"),
    ],
)
def test_what_is_no_range_of_steps(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProfileConfig(steps=words)


def test_steps_beyond_the_last_one(tmp_path: Path) -> None:
    config = make_run(tmp_path, steps=4)
    config.profile.steps = "4-5"
    with pytest.raises(ValueError, match=r"profile\.steps=4-5 must not go beyond the last step: run\.steps=4"):
        config.__post_init__()


def test_names_cost_nothing_without_a_profile() -> None:
    assert mark("attention") is mark("leave", 7) is NOTHING


def test_a_profile_changes_no_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_text(tmp_path)
    keys, rows = ("loss", "mtp_losses", "grad_norm", "aux", "violation_worst"), []
    for name, steps in (("plain", None), ("profiled", "2-3")):
        config, folder = make_run(tmp_path, steps=4), tmp_path / name
        folder.mkdir()
        config.profile.steps, config.checkpoint.save, config.run.sample.tokens = steps, False, 0
        train(config, folder)
        rows.append([[row[key] for key in keys] for row in read(folder / "metrics.jsonl", "step")])
    assert rows[0] == rows[1] and len(rows[0]) == 4
    assert not (tmp_path / "plain" / "profile").exists()
    said = capsys.readouterr().out
    assert f"profile of steps 2-3 in {tmp_path / 'profiled' / 'profile' / 'trace.json'}" in said
    assert "MiB more than as the profile began, on rank 0 in step" in said
    check_plain(tmp_path / "profiled" / "profile")


def check_plain(profile: Path) -> None:
    """Every segment of both micro-batches of both steps, there and back, and what was allocated."""
    events = json.loads((profile / "trace.json").read_text())["traceEvents"]
    done = Counter(event["name"] for event in events if event.get("tid") == 2 and event["ph"] == "X")
    for segment in ("embedding", "layers.0.attention", "layers.1.experts", "mtp.0.shared", "head", "losses"):
        for microbatch in (0, 1):
            assert done[f"{segment} F{microbatch}"] == 2, segment
            assert done[f"{segment} B{microbatch}"] >= 2, segment
    assert [event["name"] for event in events if event.get("cat") == "step"] == ["step 2", "step 3"]
    counted = [event["args"]["MiB"] for event in events if event["ph"] == "C"]
    peaks = json.loads((profile / "memory.json").read_text())
    assert [row["step"] for row in peaks] == ["step 2", "step 3"]
    assert max(row["bytes"] for row in peaks) == pytest.approx(max(counted) * 2**20, rel=1e-6)


def event(name: str, start: float, end: float, cat: str = "user_annotation", **args: Any) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": start, "dur": end - start, "args": args}


def node(number: int, start: float, end: float) -> dict[str, Any]:
    name = "autograd::engine::evaluate_function: Some"
    return event(name, start, end, "cpu_op", **{"Sequence number": number})


PAIR = [
    event("step 1", 0, 200),
    event("0F0", 1, 20),
    event("layers.0.block", 2, 18),
    event("attention", 3, 8),
    event("aten::t", 4, 5, "cpu_op", **{"Sequence number": 7}),  # asks for the number, but makes no node
    event("aten::mm", 6, 7, "cpu_op", **{"Sequence number": 7}),
    event("experts", 9, 17),
    event("aten::mm", 10, 12, "cpu_op", **{"Sequence number": 8}),
    event("0F1&0B0", 30, 100),
    event("0B0", 31, 60),
    node(8, 32, 40),
    node(3, 34, 36),  # inside of another one: computed again
    node(-1, 41, 42),  # no operation of the forward has made it
    event("leave 5", 43, 46),
    event("c10d::alltoall_base_", 44, 45, "cpu_op"),
    event("gloo:all_to_all", 47, 55),
    node(7, 43, 60),
    event("0F1", 61, 90),
    event("attention", 62, 80),
    event("land 5", 91, 92),
    event("0W0", 95, 99),
]


def test_pieces_transfers_and_waits_of_a_pair() -> None:
    origin = 1_000_000
    seen = look({"baseTimeNanoseconds": origin + 5000, "traceEvents": PAIR}, origin)
    assert seen.steps == [Range("step 1", 5, 205)]
    assert [action.name for action in seen.actions] == ["0F0", "0F1&0B0"]
    assert seen.pieces == [
        Piece("layers.0.attention", "0F0", 8, 13),
        Piece("layers.0.experts", "0F0", 14, 22),
        Piece("layers.0.experts", "0B0", 37, 47),
        Piece("layers.0.attention", "0B0", 48, 65),
        Piece("attention", "0F1", 67, 85),
        Piece("weights", "0W0", 100, 104),
    ]
    (transfer,) = seen.transfers
    assert (transfer.name, transfer.start, transfer.end, transfer.travelled) == ("gloo:all_to_all", 48, 97, (52, 60))
    assert transfer.piece == seen.pieces[3]
    assert [wait.start for wait in seen.waits] == [96]


def test_rows_of_the_network_do_not_overlap() -> None:
    twice = [*PAIR, event("c10d::send", 50, 51, "cpu_op"), event("gloo:send", 51, 120)]
    rows: dict[int, list[tuple[float, float]]] = {}
    for each in list_events(0, look({"traceEvents": twice}, 0)):
        if each["ph"] == "X" and each["tid"] >= 3 and each["cat"] != "travels":
            rows.setdefault(each["tid"], []).append((each["ts"], each["ts"] + each["dur"]))
    assert sorted(rows) == [3, 4]
    assert all(a[1] <= b[0] for row in rows.values() for a, b in pairwise(row))


def test_memory_is_thinned_and_keeps_its_peak() -> None:
    samples = [(float(time), float(value)) for time, value in ((0, 1), (5, 9), (12, 2), (30, 4), (31, 3), (60, 0))]
    assert list(thin(samples)) == [(0, 9), (30, 4), (60, 0)]
    memory = [{"ph": "i", "name": "[memory]", "ts": time, "args": {"Total Allocated": value, "Device Type": 0}}
              for time, value in ((4, 10), (11, 30), (150, 20))]  # fmt: skip
    seen = look({"traceEvents": [*PAIR, *memory]}, 0)
    assert find_peak(seen, seen.steps[0]) == (30, Piece("layers.0.experts", "0F0", 9, 17))


def test_a_step_in_which_nothing_happens() -> None:
    seen = look({"traceEvents": [event("step 1", 0, 200)]}, 0)
    assert seen == Seen([Range("step 1", 0, 200)], [], [], [], [], [])
    assert [each["name"] for each in list_events(3, seen) if each["ph"] == "X"] == ["step 1"]


def test_what_is_nested_takes_its_time_from_what_is_around_it() -> None:
    whole, first, second = Range("0B3", 0, 10), Range("0W2", 1, 2), Range("0W2", 2, 4)
    found = [(each.name, each.start, each.end) for each in _innermost([whole, first, second, Range("0F4", 11, 12)])]
    assert sorted(found, key=lambda each: each[1]) == [
        ("0B3", 0, 1), ("0W2", 1, 2), ("0W2", 2, 4), ("0B3", 4, 10), ("0F4", 11, 12),
    ]  # fmt: skip
