"""How a run stands, from its folder alone: what it has done, what it does, whether anybody still works on it.

    metrics.jsonl    steps, losses, their pace, checkpoints, the end       (its last lines are enough)
    state.json       under Slurm: what launcher/supervisor.py says of the job's attempt
    logs/rank*/      heartbeat.json: who lives, since when; record.json: who died of what

Nothing here asks Slurm (launcher/slurm/queue.py) or loads torch.
"""

import json
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from launcher.folder import RunFolder
from training.health.beat import Beat, Ending, read_beat, read_ending
from training.ramp import schedule_batches

TAIL = 2**16  # bytes of the record read from its end: about a hundred steps
SILENT = 30.0  # seconds without a heartbeat, beyond what health.heartbeat lets pass, that are no sign of life
STEPS = re.compile(r"^run:\n(?: .*\n)*?  steps: (\d+)$", re.MULTILINE)
OVER = ("finished", "interrupted", "diverged", "failed")  # nothing follows


@dataclass(frozen=True, slots=True)
class Progress:
    """What the record says. Steps are counted from 1, as a run prints them."""

    step: int = 0
    loss: float | None = None
    seconds: float | None = None  # a step's, the median of the last ones
    cursor: int = 0  # sequences seen
    held_out: tuple[int, float] | None = None  # step and loss of the last evaluation
    checkpoint: int | None = None  # step of the last one
    ending: str | None = None


def read_progress(run: Path) -> Progress:
    """From the last lines of metrics.jsonl."""
    rows = _read_tail(RunFolder(run).metrics)
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(str(row.get("kind")), []).append(row)
    steps, evals = kinds.get("step", []), kinds.get("eval", [])
    last = steps[-1] if steps else {}
    checkpoints = kinds.get("checkpoint", [])
    return Progress(
        step=last.get("step", -1) + 1,
        loss=last.get("loss"),
        seconds=statistics.median(row["seconds"] for row in steps[-20:]) if steps else None,
        cursor=last.get("cursor", 0),
        held_out=(evals[-1]["step"], evals[-1]["loss"]) if evals and evals[-1]["loss"] is not None else None,
        checkpoint=checkpoints[-1]["step"] if checkpoints else None,
        ending=rows[-1]["ending"] if rows and rows[-1].get("kind") == "end" else None,
    )


def read_steps(run: Path) -> str:
    """run.steps of the configuration, found in its text: a list of runs has no time to compose each."""
    try:
        found = STEPS.search((run / "config.yaml").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else "?"


def forecast(config: RunConfig, progress: Progress) -> float | None:
    """Seconds to the last step at the pace of the last ones; None before the first."""
    if progress.seconds is None or progress.step == 0:
        return None
    schedule = schedule_batches(config.run, config.data.sequence_length)
    pace = progress.seconds / schedule.size(progress.step - 1)
    return pace * max(0, schedule.before(config.run.steps) - progress.cursor)


def read_state(run: Path) -> dict[str, Any]:
    """state.json; nothing where there is none that can be read."""
    try:
        found = json.loads((run / "state.json").read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}


def list_ranks(run: Path) -> list[int]:
    """The ranks that have a folder of logs, ascending."""
    names = [path.name.removeprefix("rank") for path in (run / "logs").glob("rank*")]
    return sorted(int(name) for name in names if name.isdecimal())


def read_beats(run: Path) -> dict[int, Beat]:
    """The last heartbeat of each rank that has one."""
    beats = {rank: read_beat(run, rank) for rank in list_ranks(run)}
    return {rank: beat for rank, beat in beats.items() if beat is not None}


def read_endings(run: Path) -> list[Ending]:
    """The last words of ranks that ended by a fault, the earliest first."""
    endings = (read_ending(run, rank) for rank in list_ranks(run))
    return sorted((ending for ending in endings if ending is not None), key=lambda ending: ending.time)


def is_alive(beats: dict[int, Beat], heartbeat: float | None) -> bool:
    """Whether some rank has given a sign of life lately. Clocks of nodes may differ by seconds."""
    patience = SILENT + 2 * (heartbeat or 0)
    return any(time.time() - beat.time / 1e9 < patience for beat in beats.values())


def stand(run: Path, progress: Progress, beats: dict[int, Beat], heartbeat: float | None = 2.0) -> str:
    """A word on the run, from its files: one of OVER, running, starting, restarting, requeued, silent, not begun."""
    if progress.ending is not None:
        return progress.ending
    state = str(read_state(run).get("state", ""))
    if state in OVER:
        return state
    if is_alive(beats, heartbeat):
        return "running"
    if state in ("starting", "restarting", "requeued"):
        return state
    if not beats and not progress.step:
        return "not begun"
    return "failed" if read_endings(run) else "silent"


def _read_tail(path: Path) -> list[dict[str, Any]]:
    """The rows of the last lines of a record that are whole."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[1 if size > TAIL else 0 : -1]:  # the first may begin in the middle, the last is not ended
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows
