"""Traces as the viewers read them: simulated and measured runs side by side, times in microseconds."""

import json
from pathlib import Path

from parallel.pipeline.action import Action, Op, Overlap
from parallel.pipeline.schedules import generate
from parallel.pipeline.simulate import Cost, simulate
from parallel.pipeline.trace import Span, write


def test_runs_lie_side_by_side_in_each_rank(tmp_path: Path) -> None:
    timeline = simulate(generate("dualpipev", 2, 4), Cost(send=1))
    simulated = list(timeline.rows(range(2), second=2e-3))
    measured = [span._replace(start=span.start * 1.1, end=span.end * 1.1) for span in simulated]
    path = tmp_path / "trace.json"
    count = sum(map(len, timeline.schedule.lists))
    assert write(path, {"simulated": simulated, "measured": measured}) == 2 * count

    events = json.loads(path.read_text())["traceEvents"]
    names = {
        (event["name"], event["pid"], event["tid"]): event["args"]["name"] for event in events if event["ph"] == "M"
    }
    for rank in range(2):
        assert names["thread_name", rank, 0] == "simulated" and names["thread_name", rank, 1] == "measured"
        assert names["process_name", rank, 0] == names["process_name", rank, 1] == f"rank {rank}"
    boxes = [event for event in events if event["ph"] == "X"]
    for thread, spans in enumerate((simulated, measured)):
        mine = [event for event in boxes if event["tid"] == thread]
        assert [event["pid"] for event in mine] == [span.rank for span in spans]
        assert [event["name"] for event in mine] == [str(span.action) for span in spans]
        assert [event["ts"] for event in mine] == [span.start * 1e6 for span in spans]
        assert [event["dur"] for event in mine] == [(span.end - span.start) * 1e6 for span in spans]
    assert boxes[0]["dur"] == 2000.0, "a unit of cost was two milliseconds"


def test_an_action_says_what_it_is(tmp_path: Path) -> None:
    pair = Overlap(Action(Op.F, 3, 5), Action(Op.I, 0, 1))
    write(tmp_path / "t", {"measured": [Span(7, pair, 0.5, 0.75), Span(7, Action(Op.W, 0, 1), 0.75, 1.0)]})
    first, second = (e for e in json.loads((tmp_path / "t").read_text())["traceEvents"] if e["ph"] == "X")
    assert (first["name"], first["cat"], first["pid"], first["ts"], first["dur"]) == ("3F5&0I1", "F&I", 7, 5e5, 2.5e5)
    assert first["args"] == {"F": "stage 3, micro-batch 5", "I": "stage 0, micro-batch 1"}
    assert (second["name"], second["cat"]) == ("0W1", "W")


def test_a_trace_of_nothing_is_a_trace(tmp_path: Path) -> None:
    assert write(tmp_path / "t", {"measured": []}) == 0
    assert json.loads((tmp_path / "t").read_text())["traceEvents"] == []
