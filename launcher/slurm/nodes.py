"""What a job asks Slurm from inside: its nodes, whether they are well, to end its steps, to wait in the queue again."""

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

BROKEN = ("down", "drain", "fail", "unknown", "power", "reboot")  # in a node's state; * behind it: it does not answer
PATIENCE, ANSWER = 60, 15  # seconds for Slurm, and for a node, to answer


@dataclass(frozen=True, slots=True)
class Job:
    """What Slurm says of this job."""

    id: str
    attempt: int  # how often it has been put back into the queue
    nodes: tuple[str, ...]
    here: str  # this node

    @property
    def name(self) -> str:
        """As an attempt at a run."""
        return f"{self.id}.{self.attempt}"


def read_job() -> Job:
    """Of the environment of a batch script. Raises ValueError outside of one."""
    number = os.environ.get("SLURM_JOB_ID")
    if number is None:
        raise ValueError("SLURM_JOB_ID is missing in the environment: this is for batch scripts; see shoestring submit")
    names = expand(os.environ["SLURM_JOB_NODELIST"])
    return Job(number, int(os.environ.get("SLURM_RESTART_COUNT", "0")), names, os.environ["SLURMD_NODENAME"])


def expand(names: str) -> tuple[str, ...]:
    """``n[1-3]`` is n1, n2, n3."""
    return tuple(_ask("scontrol", "show", "hostnames", names).split())


def find_broken(nodes: Sequence[str]) -> set[str]:
    """Those of ``nodes`` that Slurm no longer counts on; none where it does not answer."""
    lines = _ask("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T").splitlines()
    states = (line.partition(" ")[::2] for line in lines)
    return {name for name, state in states if state.endswith("*") or any(word in state.lower() for word in BROKEN)}


def answers(node: str) -> bool:
    """Whether a node of this job still does what it is told. One that is lost may not be known to be for minutes."""
    words = ["srun", "--overlap", f"--nodelist={node}", "--nodes=1", "--ntasks=1", "--mpi=none", "--input=none", "true"]
    try:
        return not subprocess.run(words, capture_output=True, check=False, timeout=ANSWER).returncode  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return False


def end_steps(job: str) -> None:
    """Ends all steps of a job by force, but not the batch script."""
    for step in _ask("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split():
        if step.rpartition(".")[2].isdecimal():
            _ask("scancel", "--signal=KILL", step)


def requeue(job: str, without: Sequence[str] = ()) -> None:
    """Puts a job that runs back into the queue, never to run on the nodes ``without`` again. Who calls this ends soon.

    After a node was lost Slurm has done so already, and says that it cannot. A job that runs is not told where not to,
    and the requeue ends all that the job runs with SIGTERM, later by force: both commands live through it.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what is started from here on inherits that
    _ask("scontrol", "requeue", job)
    if without:
        _ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(without)}")


def _ask(*words: str) -> str:
    """What one of Slurm's commands answers; "" where it does not."""
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False, timeout=PATIENCE).stdout  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
