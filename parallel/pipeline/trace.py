"""What ran when, as rows, and as a trace that Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing) open.

    Span(rank, action, start, end)        one action of a simulated or a measured run, in seconds

Runs lie side by side: a rank is a process of the trace, and each run is a thread in it, so that what was foretold for a
rank stands right above what happened there. In the trace times are microseconds, as its format wants them.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from parallel.pipeline.action import Compute, parts


class Span(NamedTuple):
    """One action of a run: on ``rank`` from ``start`` to ``end``. Seconds, from the start of the step."""

    rank: int
    action: Compute
    start: float
    end: float


def write(path: Path, runs: Mapping[str, Iterable[Span]]) -> int:
    """Writes the trace of ``runs`` (name -> what ran) to ``path``, row by row; returns how many actions it has."""
    count = 0
    with path.open("w") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [')
        for number, event in enumerate(list_events(runs)):
            file.write(("," if number else "") + "\n" + json.dumps(event))
            count += event["ph"] == "X"
        file.write("\n]}\n")
    return count


def list_events(runs: Mapping[str, Iterable[Span]]) -> Iterator[dict[str, Any]]:
    """The rows of the trace: complete events (``X``), and the names of ranks and runs (``M``)."""
    for thread, (run, spans) in enumerate(runs.items()):
        named: set[int] = set()
        for span in spans:
            if span.rank not in named:
                named.add(span.rank)
                yield _name("process_name", span.rank, thread, f"rank {span.rank}")
                yield _name("thread_name", span.rank, thread, run)
            yield {
                "ph": "X",
                "name": str(span.action),
                "cat": _sort(span.action),
                "pid": span.rank,
                "tid": thread,
                "ts": float(span.start) * 1e6,
                "dur": float(span.end - span.start) * 1e6,
                "args": {
                    part.op.name: f"stage {part.stage}, micro-batch {part.microbatch}" for part in parts(span.action)
                },
            }


def _sort(action: Compute) -> str:
    """``F``, ``B``, ``I``, ``W``, or ``F&B``: what the trace's viewer groups and filters by."""
    return "&".join(part.op.name for part in parts(action))


def _name(what: str, rank: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}}
