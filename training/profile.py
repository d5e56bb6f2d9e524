"""A profile of some steps of a run: what every rank computes, sends and allocates, as traces that Perfetto opens.

    runs/<id>/profile/rank-<r>.json.gz    every operation of a rank, as torch.profiler has seen it
                      trace.json          the ranks of the first machine side by side: training/timeline.py
                      memory.json         the most that each of them had allocated in every step, and what for
                      rank-<r>.pickle     on CUDA: torch's snapshot of the allocator, for pytorch.org/memory_viz

Nothing is recorded, and nothing costs anything, outside of ``profile.steps``. A profile changes no number.
"""

import gzip
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from parallel.pipeline.trace import list_events as list_spans
from parallel.topology import Axis
from training.agree import wait_for_all
from training.picture import simulate_step
from training.setup import Setup
from training.timeline import Seen, describe, find_peak, list_events, look

ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}  # besides the CPU's
HISTORY = 1_000_000  # calls of the allocator that a snapshot has


class Profile:
    """The profile of a run: of the steps that ``profile.steps`` names, or of none."""

    def __init__(self, setup: Setup, folder: Path, note: Callable[[str], None]) -> None:
        """``folder`` is the run's; ``note`` gets lines for a person."""
        self._setup, self._folder, self._note = setup, folder / "profile", note
        self._config, self._steps = setup.config.profile, setup.config.profile.range()
        self._profiler: profile | None = None

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """What happens inside is step ``step``, from 0. Collective over all ranks where a profile begins or ends."""
        if step not in self._steps:
            yield
            return
        if self._profiler is None:
            self._profiler = self._start()
        with record_function(f"step {step + 1}"):
            yield
        if step + 1 == self._steps.stop:
            self.close()

    def close(self) -> None:
        """Ends the profile, if it has begun, and writes it. Collective over all ranks."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        mesh, path = self._setup.mesh, self._folder / f"rank-{self._setup.mesh.rank}.json.gz"
        profiler.stop()
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(path))
        if self._remembers:
            torch.cuda.memory._dump_snapshot(str(path.with_name(f"rank-{mesh.rank}.pickle")))
            torch.cuda.memory._record_memory_history(enabled=None)
        wait_for_all(mesh)
        if mesh.rank == 0:
            self._join()

    @property
    def _remembers(self) -> bool:
        return self._config.memory and self._setup.mesh.device.type == "cuda"

    def _start(self) -> profile:
        device = self._setup.mesh.device.type
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch tells every terminal that it begins
        if self._remembers:
            torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        # The profiler follows allocations or threads that it has not seen begin, such as that of the engine's sums.
        threads = torch._C._profiler._ExperimentalConfig(profile_all_threads=not self._config.memory)
        profiler = profile(
            activities=[ProfilerActivity.CPU, *([ACTIVITIES[device]] if device in ACTIVITIES else [])],
            profile_memory=self._config.memory,
            experimental_config=threads,
        )
        profiler.start()
        wait_for_all(self._setup.mesh)  # beginning takes a while, on every rank another
        return profiler

    def _join(self) -> None:
        """Writes one trace of all ranks of this machine, and what they had allocated."""
        ranks = range(min(self._setup.mesh.ranks_per_node, self._setup.mesh.topology.world))
        traces = {rank: json.loads(gzip.decompress(self._path(rank).read_bytes())) for rank in ranks}
        origin = min(_find_start(trace) for trace in traces.values())
        seen = {rank: look(trace, origin) for rank, trace in traces.items()}
        events = [event for rank, each in seen.items() for event in list_events(rank, each)]
        events += self._simulate(seen)
        rows = {"displayTimeUnit": "ms", "baseTimeNanoseconds": origin, "traceEvents": events}
        (self._folder / "trace.json").write_text(json.dumps(rows), encoding="utf-8")
        self._note(f"profile of steps {self._config.steps} in {self._folder / 'trace.json'}: open it in ui.perfetto.dev")
        if self._config.memory:
            self._tell_memory(seen)

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank}.json.gz"

    def _simulate(self, seen: dict[int, Seen]) -> list[dict[str, Any]]:
        """The simulated step of every rank, as long as the measured ones and beside them."""
        timeline, events = simulate_step(self._setup.config, self._setup.mesh), list[dict[str, Any]]()
        steps = {step.name: step for each in seen.values() for step in each.steps}
        for name in steps:
            inside = [
                action
                for each in seen.values()
                for step in each.steps
                if step.name == name
                for action in each.actions
                if step.holds(action.start)
            ]
            start, end = min(action.start for action in inside), max(action.end for action in inside)
            second = (end - start) / 1e6 / float(timeline.makespan)
            for rank in seen:
                place = self._setup.mesh.topology.coordinate(rank, Axis.pp)
                spans = list_spans({"simulated": timeline.rows((place,), second)})
                events += [
                    event | {"pid": rank, "tid": 0, "ts": event["ts"] + start} for event in spans if event["ph"] == "X"
                ]
        return events

    def _tell_memory(self, seen: dict[int, Seen]) -> None:
        rows = []
        for rank, each in seen.items():
            for step in each.steps:
                if (peak := find_peak(each, step)) is not None:
                    where = "" if peak[1] is None else describe(peak[1])[0]
                    rows.append({"rank": rank, "step": step.name, "bytes": peak[0], "in": where})
        (self._folder / "memory.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if rows:
            top = max(rows, key=lambda row: row["bytes"])
            self._note(
                f"memory: at most {top['bytes'] / 2**20:.1f} MiB more than as the profile began, on rank {top['rank']} "
                f"in {top['step']}, {top['in'] or 'outside of segments'}"
            )


def _find_start(trace: dict[str, Any]) -> int:
    """Nanoseconds since 1970 at which the first step of a rank's profile begins."""
    first = min(event["ts"] for event in trace["traceEvents"] if str(event.get("name")).startswith("step "))
    return int(trace.get("baseTimeNanoseconds", 0)) + int(first * 1000)
