"""``shoestring logs <run>``: what its ranks and its jobs have said, and who said it; ``follow=true`` goes on.

    rank 0 | step 15/300  loss 3.953 ...           logs/rank0/stdout.log
    rank 1 ! Traceback (most recent call last):    logs/rank1/stderr.log
    job 12 | slurmstepd: ...                       job-12.out

Without ``follow`` the last lines of each file, one file after the other: no line says when it was written. Following,
lines come as they are found, until the run is over. A log that is set aside, as when a run goes on, is left for its
successor.
"""

import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launcher import cli, folder
from launcher.console import SEQUENCE
from launcher.invocation import Invocation
from launcher.slurm import jobs, queue
from launcher.standing import is_alive, list_ranks, read_beats, read_progress, read_state

SUMMARY = "print what the ranks of a run have said, or follow it"
ARGUMENTS = ("run",)
PAUSE = 0.3  # seconds between looks
QUEUE = 10.0  # seconds between questions to Slurm, which many ask
LARGEST = 2**20  # bytes read of a file at a time
SIGNS = {"stdout.log": "|", "stderr.log": "!"}


@dataclass(kw_only=True, slots=True)
class Config:
    """Which, and how many."""

    folder: str = "runs"  # where runs are looked for by their id
    rank: int | None = None  # null: all, and what Slurm wrote
    follow: bool = False  # go on until the run is over
    lines: int = 20  # of each file, from its end

    def __post_init__(self) -> None:
        if self.lines < 0:
            raise ValueError(f"lines={self.lines} must not be negative")


@dataclass(slots=True)
class Log:
    """A file that is read from where it was left."""

    path: Path
    label: str
    place: int = 0  # bytes that were read
    rest: str = ""  # of a line that has no end yet
    number: int = field(default=0)  # inode: a file of the same name may be another's

    def skip(self, lines: int) -> None:
        """Goes to where the last ``lines`` begin."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LARGEST))
            tail = file.read()
        ends = [found.end() for found in re.finditer(rb"\n", tail)]
        kept = [0, *ends][-lines - 1 :][0] if lines else len(tail)
        self.place, self.number = max(0, size - len(tail)) + kept, self.path.stat().st_ino

    def read(self, last: bool = False) -> Iterator[str]:
        """The lines that are there now; with ``last`` also one that is not ended."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self.number or status.st_size < self.place:
                    self.place, self.rest, self.number = 0, "", status.st_ino
                file.seek(self.place)
                content = file.read(LARGEST)
        except OSError:  # set aside
            return
        self.place += len(content)
        *lines, self.rest = (self.rest + content.decode(errors="replace")).split("\n")
        if last and self.rest:
            lines, self.rest = [*lines, self.rest], ""
        for line in lines:
            yield f"{self.label} {clean(line)}"


def run(config: Config, invocation: Invocation) -> int:
    """Prints. Exit code 0; Ctrl-C ends it."""
    path = folder.open(invocation.arguments[0], config.folder).path
    if config.rank is not None and not config.follow and config.rank not in (ranks := list_ranks(path)):
        shown = f"one of {', '.join(map(str, ranks))}" if ranks else "left out: no rank has a log"
        raise ValueError(f"rank={config.rank} must be {shown} in {path / 'logs'}")
    logs: dict[Path, Log] = {}
    _find(path, config.rank, logs)
    for log in logs.values():
        log.skip(config.lines)
        _print(log.read(last=not config.follow))
    if not logs:
        print(f"nothing was said yet in {path}", file=sys.stderr, flush=True)
    if config.follow:
        follow(path, config.rank, logs)
    return 0


def follow(run: Path, rank: int | None, logs: dict[Path, Log]) -> None:
    """Prints what is new until the run is over, and what it said last."""
    asked, over = -QUEUE, False
    while True:
        said = 0
        _find(run, rank, logs)
        for log in logs.values():
            said += _print(log.read(last=over))
        if over and not said:
            return
        if not said:
            time.sleep(PAUSE)
        if not over and time.monotonic() - asked > (QUEUE if jobs.read(run) else 1.0):
            asked, over = time.monotonic(), is_over(run)


def is_over(run: Path) -> bool:
    """Whether nobody will say anything any more, as far as can be told."""
    if read_progress(run).ending is not None or read_state(run).get("state") in ("finished", "interrupted", "failed"):
        return True
    known = [each.job for each in jobs.read(run)]
    try:
        alive = any(job.alive for job in queue.look_up(known).values())
    except queue.SlurmError:
        alive = bool(known)  # nobody can tell
    beats = read_beats(run)
    return not alive and bool(beats or known) and not is_alive(beats, 2.0)


def clean(line: str) -> str:
    """A line as a terminal keeps it: without colours and movements, of a renewed line what stands at its end."""
    return SEQUENCE.sub("", line).rstrip("\r").rpartition("\r")[2]


def _find(run: Path, rank: int | None, logs: dict[Path, Log]) -> None:
    """Adds files that are new to ``logs``."""
    for each in list_ranks(run) if rank is None else [rank]:
        for name, sign in SIGNS.items():
            path = run / "logs" / f"rank{each}" / name
            if path not in logs and path.is_file():
                logs[path] = Log(path, f"rank {each} {sign}")
    for path in sorted(run.glob("job-*.out")) if rank is None else ():
        if path not in logs:
            logs[path] = Log(path, f"job {path.stem.removeprefix('job-')} |")


def _print(lines: Iterator[str]) -> int:
    found = list(lines)
    if found:
        print("\n".join(found), flush=True)
    return len(found)


if __name__ == "__main__":
    sys.exit(cli.main(["logs", *sys.argv[1:]]))
