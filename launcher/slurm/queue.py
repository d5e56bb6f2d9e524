"""What Slurm is asked, by its own commands: to take a job, whether it would, how jobs stand, to end them.

Only commands that every cluster has: sbatch, squeue, scancel, scontrol. None goes through a shell; each has a minute.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.slurm.reasons import ALIVE

PATIENCE = 60  # seconds
FORMAT = ("%i", "%T", "%M", "%L", "%S", "%N", "%D", "%E", "%r")  # what ``Job`` has, in this order
# Variables that sbatch puts above the lines of a script, where they are not named SBATCH_ and the option.
VARIABLES = {"time": "TIMELIMIT", "array": "ARRAY_INX", "dependency": "DEPENDENCY", "mem": "MEM_PER_NODE"}


class SlurmError(Exception):
    """Slurm does not answer, or not in a way that is known here."""


@dataclass(frozen=True, slots=True)
class Job:
    """How a job stands. Times are Slurm's texts."""

    id: str  # 123, or 123_4 of an array
    state: str
    elapsed: str
    left: str
    start: str  # or when it is expected to
    nodes: str
    count: str  # of nodes
    dependency: str
    reason: str

    @property
    def alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state in ALIVE


def is_there(command: str = "sbatch") -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which(command) is not None


def submit(script: Path, options: Iterable[str]) -> str:
    """Hands ``script`` to Slurm, and returns the job's id. ``ValueError`` with Slurm's words if it is refused.

    ``options`` are those that the script sets: variables of the environment do not count for them.
    """
    answer = _run(["sbatch", "--parsable", str(script)], environment=_without(options))
    if answer.returncode:
        raise ValueError(f"Slurm refuses the job: {shorten(answer.stderr)}")
    job = answer.stdout.strip().partition(";")[0]
    if not job.isdecimal():
        raise SlurmError(f"sbatch answered {answer.stdout!r}, where a job's number should be")
    return job


def try_out(script: str, options: Iterable[str]) -> tuple[bool, str]:
    """Whether Slurm would take a job with this text, and what it says: when it would start, or why it would not."""
    answer = _run(["sbatch", "--test-only"], text=script, environment=_without(options))
    if answer.returncode and _run(["scontrol", "ping"]).returncode:
        raise SlurmError(shorten(answer.stderr))
    return answer.returncode == 0, shorten(answer.stderr)


def look_up(jobs: Sequence[str]) -> dict[str, Job]:
    """How these jobs stand, by their ids. Jobs that have been over for some minutes are not known to Slurm any more."""
    if not jobs:
        return {}
    words = ["--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", f"--format={'|'.join(FORMAT)}"]
    answer = _run(["squeue", *words])
    if answer.returncode:
        if "Invalid job id" in answer.stderr:
            return {}
        raise SlurmError(f"squeue says: {shorten(answer.stderr)}")
    rows = [line.split("|", len(FORMAT) - 1) for line in answer.stdout.splitlines()]
    return {row[0]: Job(*row) for row in rows if len(row) == len(FORMAT)}


def cancel(jobs: Sequence[str], *options: str) -> None:
    """Ends these jobs, those that wait and those that run."""
    answer = _run(["scancel", *options, *jobs]) if jobs else None
    if answer is not None and answer.returncode:
        raise SlurmError(f"scancel says: {shorten(answer.stderr)}")


def tell(jobs: Sequence[str]) -> None:
    """Asks the batch scripts of jobs that run to end: launcher/supervise.py has the ranks save before."""
    cancel(jobs, "--batch", "--signal=TERM")


def shorten(text: str) -> str:
    """What a command of Slurm's says, on one line, without its own name in front of each."""
    lines = (
        line.partition(": ")[2] if line.startswith(("sbatch: ", "squeue: ", "scancel: ")) else line
        for line in text.splitlines()
    )
    return "; ".join(line.removeprefix("error: ").strip() for line in lines if line.strip())


def _without(options: Iterable[str]) -> dict[str, str]:
    names = {f"SBATCH_{VARIABLES.get(option, option.upper().replace('-', '_'))}" for option in options}
    return {name: value for name, value in os.environ.items() if name not in names}


def _run(
    words: list[str], text: str = "", environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, input=text, capture_output=True, text=True, timeout=PATIENCE, env=environment)  # noqa: S603
    except FileNotFoundError:
        raise SlurmError(
            f"{words[0]} is not on this machine: Slurm's commands are on a cluster's login nodes"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} has not answered for {PATIENCE} seconds") from None
