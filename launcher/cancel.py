"""``shoestring cancel <run>``: ends a run: its jobs, waiting and running, or the processes that train it here.

A job that waits is taken out of the queue. Of one that runs, the batch script is told, and has its ranks save and end;
with ``now=true`` Slurm ends all of it within seconds. A process of this machine gets SIGINT, as from Ctrl-C: the run
saves, and ends; or SIGTERM where it was started to ignore that, as behind `&` in a script. It is signalled only if it
is this run's: if it has a file of the run's folder open, or was started with its path. A number alone may be somebody
else's by now.
"""

import os
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import cli, folder
from launcher.invocation import Invocation
from launcher.slurm import jobs, queue
from launcher.standing import read_beats, read_state

SUMMARY = "end a run: its jobs, or its processes on this machine"
ARGUMENTS = ("run",)


@dataclass(kw_only=True, slots=True)
class Config:
    """Where to look."""

    folder: str = "runs"  # where runs are looked for by their id
    now: bool = False  # ranks get no time to save


def run(config: Config, invocation: Invocation) -> int:
    """Says what was ended. ``ValueError`` where there is nothing to end."""
    path = folder.open(invocation.arguments[0], config.folder).path
    known = [each.job for each in jobs.read(path)]
    try:
        found = queue.look_up(known)
        alive = [found[job] for job in known if job in found and found[job].alive]
        told = [job.id for job in alive if job.state == "RUNNING" and not config.now]
        gone = [job.id for job in alive if job.id not in told]
        queue.cancel(gone)
        queue.tell(told)
    except queue.SlurmError as error:
        raise ValueError(f"{path}: its jobs could not be ended: {error}") from None
    if gone:
        print(f"cancelled job {', '.join(gone)} of {path}")
    if told:
        print(f"told job {', '.join(told)} of {path} to end: its ranks save first; now=true does not wait for them")
    if alive:
        return 0
    process = find_process(path)
    if process is None:
        there = "its jobs are over, and" if known else "it has no job, and"
        raise ValueError(f"{path} has nothing to end: {there} no process on {socket.gethostname()} works on it")
    number = signal.SIGTERM if config.now else choose_signal(process)
    os.kill(process, number)
    does = "saves and ends" if number is signal.SIGINT else "ends without saving"
    print(f"told process {process} of {path} to end by {number.name}: it {does}")
    return 0


def find_process(run: Path) -> int | None:
    """The process on this machine that has to be told: the one that started the ranks, or the only one."""
    here, state, beats = socket.gethostname(), read_state(run), read_beats(run)
    told = [int(state["process"])] if state.get("node") == here and str(state.get("process", "")).isdecimal() else []
    for process in told:
        if is_of(process, run):
            return process
    for beat in beats.values():
        if beat.node == here and is_of(beat.pid, run):
            return _read_parent(beat.pid) if b"launcher.child" in _read_words(beat.pid) else beat.pid
    return None


def is_of(process: int, run: Path) -> bool:
    """Whether ``process`` works on ``run``: it has a file of it open, or its path among its words."""
    place, folder = Path(f"/proc/{process}"), run.resolve()
    try:
        here = Path(os.readlink(place / "cwd"))
        words = [(here / os.fsdecode(word)).resolve() for word in _read_words(process)[1:] if word]
        opened = [Path(os.readlink(each)) for each in (place / "fd").iterdir()]
    except OSError:  # it is gone, or somebody else's
        return False
    return folder in words or any(path.is_relative_to(folder) for path in opened)


def choose_signal(process: int) -> signal.Signals:
    """SIGINT, or SIGTERM for a process that ignores it."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    ignored = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigIgn:"))
    return signal.SIGTERM if ignored >> (signal.SIGINT - 1) & 1 else signal.SIGINT


def _read_words(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _read_parent(process: int) -> int:
    text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    return int(text.rpartition(")")[2].split()[1])


if __name__ == "__main__":
    sys.exit(cli.main(["cancel", *sys.argv[1:]]))
