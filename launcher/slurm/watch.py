"""How the jobs of a run stand, in words: what Slurm says of those in jobs.jsonl, beside what the run's files say."""

import time
from collections.abc import Sequence
from pathlib import Path

from launcher.slurm import jobs, queue
from launcher.slurm.reasons import ENDED, STATES, explain
from launcher.standing import OVER
from training.clock import write_age

DONE = ("finished", "diverged")  # whatever comes
GOOD = ("finished", "interrupted")  # ends of a run that nothing went wrong in


def judge(word: str, found: Sequence[queue.Job]) -> str:
    """How a run stands whose files say ``word`` and of whose jobs Slurm knows ``found``, the newest last.

    One that was interrupted, or has failed, goes on once another job of its is there: its files learn of it later.
    """
    begun = [job for job in found if job.state in ("PENDING", "CONFIGURING", "RUNNING")]
    if word in DONE or (word in OVER and not begun) or not found:
        return word
    running = [job for job in begun if job.state == "RUNNING"]
    return STATES.get((running or begun or found)[-1].state, word)


def describe_jobs(run: Path, word: str) -> tuple[list[queue.Job], list[str]]:
    """The run's jobs that Slurm still knows, the newest last, and lines about those that are not over, or the last.

    ``word`` is how the run stands by its files: what is over in good order has no reason to give.
    """
    known = jobs.read(run)
    if not known:
        return [], []
    name = f"job      {known[-1].job}"
    try:
        found = queue.look_up([each.job for each in known])
    except queue.SlurmError as error:
        return [], [f"{name}: {error}"]
    there = [found[each.job] for each in known if each.job in found]
    alive = [job for job in there if job.alive]
    if alive:
        return there, [f"job      {job.id}: {describe_job(job, run)}" for job in alive]
    if there:
        last = there[-1]
        return there, [f"{name}: {f'over after {last.elapsed}' if word in GOOD else _end(last, run)}"]
    since = write_age(time.time() - known[-1].time / 1e9)
    return [], [f"{name}: submitted {since} ago, is over and no longer in the queue"]


def describe_job(job: queue.Job, run: Path) -> str:
    """A job that waits or runs, in words."""
    words = STATES.get(job.state, job.state)
    if job.state == "PENDING":
        when = f", expected to start at {job.start.replace('T', ' ')}" if job.start[:1].isdecimal() else ""
        after = f" ({job.dependency})" if job.reason == "Dependency" else ""
        return f"{explain(job.reason, job.id, run.name)}{after}{when}"
    if job.state in ("COMPLETING", "CONFIGURING"):
        return f"{words} on {job.nodes}"
    if job.state == "RUNNING":
        left = "without a limit" if job.left == "UNLIMITED" else f"{job.left} left"
        return f"{words} on {job.nodes} for {job.elapsed}, {left}"
    return words if job.reason == "None" else f"{words}: {explain(job.reason, job.id, run.name)}"


def _end(job: queue.Job, run: Path) -> str:
    words = STATES.get(job.state, job.state)
    reason = f": it {explain(job.reason, job.id, run.name)}" if job.state in ENDED and job.reason != "None" else ""
    return f"{words} after {job.elapsed}{reason}"
