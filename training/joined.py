"""The profiles of the ranks of a machine as one trace, the ranks side by side, and what they had allocated.

    rank-0.json.gz, rank-1.json.gz, ..  ->  trace.json, memory.json

Each rank is a process of the trace, and the threads are those of training/timeline.py: on top the simulated step, drawn
as long as the measured one.
"""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parallel.pipeline.simulate import Timeline
from parallel.pipeline.trace import list_events as list_spans
from training.timeline import Seen, describe, find_peak, list_events, look


def join(folder: Path, places: Mapping[int, int], timeline: Timeline) -> Path:
    """Writes the trace of the ranks in ``places``, each at that place of its pipeline; returns where it is.

    ``timeline`` is the simulated step. Raises OSError where a rank's profile is not there.
    """
    traces = {rank: json.loads(gzip.decompress((folder / f"rank-{rank}.json.gz").read_bytes())) for rank in places}
    origin = min(_find_start(trace) for trace in traces.values())
    seen = {rank: look(trace, origin) for rank, trace in traces.items()}
    events = [event for rank, each in seen.items() for event in list_events(rank, each)]
    events += [event for name in _name_steps(seen) for event in _simulate(seen, name, places, timeline)]
    rows = {"displayTimeUnit": "ms", "baseTimeNanoseconds": origin, "traceEvents": events}
    (folder / "trace.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "memory.json").write_text(json.dumps(list(_list_peaks(seen)), indent=1), encoding="utf-8")
    return folder / "trace.json"


def tell_memory(folder: Path) -> str:
    """``memory.json`` in a line."""
    rows = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    if not rows:
        return "memory: the profiler has seen none allocated"
    top = max(rows, key=lambda row: row["bytes"])
    return (
        f"memory: at most {top['bytes'] / 2**20:.1f} MiB more than as the profile began, on rank {top['rank']} in "
        f"{top['step']}, {top['in'] or 'outside of segments'}"
    )


def _name_steps(seen: Mapping[int, Seen]) -> list[str]:
    return list(dict.fromkeys(step.name for each in seen.values() for step in each.steps))


def _simulate(
    seen: Mapping[int, Seen], name: str, places: Mapping[int, int], timeline: Timeline
) -> Iterator[dict[str, Any]]:
    """The simulated step beside the measured step ``name``."""
    steps = [(step, each.actions) for each in seen.values() for step in each.steps if step.name == name]
    inside = [action for step, actions in steps for action in actions if step.holds(action.start)]
    if not inside:  # interrupted as it began
        return
    start, end = min(action.start for action in inside), max(action.end for action in inside)
    second = (end - start) / 1e6 / float(timeline.makespan)
    for rank in seen:
        for event in list_spans({"simulated": timeline.rows((places[rank],), second)}):
            if event["ph"] == "X":
                yield event | {"pid": rank, "tid": 0, "ts": event["ts"] + start}


def _list_peaks(seen: Mapping[int, Seen]) -> Iterator[dict[str, Any]]:
    """A row for every rank and step."""
    for rank, each in seen.items():
        for step in each.steps:
            if (peak := find_peak(each, step)) is not None:
                where = "" if peak[1] is None else describe(peak[1])[0]
                yield {"rank": rank, "step": step.name, "bytes": peak[0], "in": where}


def _find_start(trace: dict[str, Any]) -> int:
    """Nanoseconds since 1970 at which the first step of a rank's profile begins."""
    first = min(event["ts"] for event in trace["traceEvents"] if str(event.get("name")).startswith("step "))
    return int(trace.get("baseTimeNanoseconds", 0)) + int(first * 1000)
