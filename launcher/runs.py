"""``shoestring runs``: a line for each run in a folder: how it stands, its steps, its loss, its job, its age.

One question to Slurm for all jobs, and the last lines of each record: a folder of hundreds takes a second or two.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launcher import cli
from launcher.invocation import Invocation
from launcher.slurm import jobs, queue
from launcher.slurm.watch import judge
from launcher.standing import read_beats, read_progress, read_steps, stand
from training.clock import write_age

SUMMARY = "list the runs of a folder: how each stands, its steps, loss, job and age"
COLUMNS = ("run", "state", "step", "loss", "held out", "job", "changed")


@dataclass(kw_only=True, slots=True)
class Config:
    """Which."""

    folder: str = "runs"  # that has them
    newest: int = 50  # so many; 0: all

    def __post_init__(self) -> None:
        if self.newest < 0:
            raise ValueError(f"newest={self.newest} must not be negative")


class Line(NamedTuple):
    """A run, in words."""

    run: str
    state: str
    step: str
    loss: str
    held_out: str
    job: str
    changed: str


def run(config: Config, invocation: Invocation) -> int:
    """Prints the newest last."""
    paths = sorted((path.parent for path in Path(config.folder).glob("*/config.yaml")), key=find_time)
    if not paths:
        raise ValueError(f"folder={config.folder} has no run in it: shoestring train or submit makes one")
    lines = list_runs(paths[-config.newest :])
    widths = [max(len(row[column]) for row in (COLUMNS, *lines)) for column in range(len(COLUMNS))]
    for row in (COLUMNS, *lines):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    return 0


def list_runs(paths: list[Path]) -> list[Line]:
    """A line for each."""
    known = {path: [each.job for each in jobs.read(path)] for path in paths}
    try:
        found = queue.look_up([job for each in known.values() for job in each])
    except queue.SlurmError as error:
        print(f"shoestring: jobs are not known: {error}", file=sys.stderr)
        found = {}
    return [_describe(path, [found[job] for job in known[path] if job in found]) for path in paths]


def find_time(run: Path) -> float:
    """When something last changed in a run."""
    times = [
        path.stat().st_mtime for name in ("config.yaml", "metrics.jsonl", "state.json") if (path := run / name).exists()
    ]
    return max(times, default=0.0)


def _describe(run: Path, found: list[queue.Job]) -> Line:
    progress, beats = read_progress(run), read_beats(run)
    word = judge(stand(run, progress, beats), found)
    alive = [job for job in found if job.alive]
    return Line(
        run.name,
        word,
        f"{progress.step}/{read_steps(run)}",
        "" if progress.loss is None else f"{progress.loss:.4f}",
        "" if progress.held_out is None else f"{progress.held_out[1]:.4f}",
        (alive or found)[-1].id if found else "",
        f"{write_age(time.time() - find_time(run))} ago",
    )


if __name__ == "__main__":
    sys.exit(cli.main(["runs", *sys.argv[1:]]))
