"""``shoestring status <run>``: how a run stands: its job, its steps, its ranks, and why it is not running, in words.

From the run's folder (launcher/standing.py), and, where the run has jobs, from Slurm's queue. Slurm's accounts (sacct)
are not asked: many clusters keep none. A job that has been over for some minutes is known from the folder alone.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from configs.schema import RunConfig
from launcher import cli, folder
from launcher.invocation import Invocation
from launcher.report import read_verdict
from launcher.slurm.watch import describe_jobs, judge
from launcher.standing import (
    Progress,
    forecast,
    is_alive,
    list_ranks,
    read_beats,
    read_endings,
    read_progress,
    read_state,
    stand,
)
from training.clock import write_age, write_time
from training.health.beat import Beat

SUMMARY = "say how a run stands, and why it is not running"
ARGUMENTS = ("run",)
MANY = 8  # ranks: so many are listed one by one
FAILED = ("failed", "silent", "diverged", "ended: out of memory")
HELD = ("held", "Held")  # in a reason: nothing happens until somebody does something


@dataclass(kw_only=True, slots=True)
class Config:
    """Where to look."""

    folder: str = "runs"  # where runs are looked for by their id


def run(config: Config, invocation: Invocation) -> int:
    """Prints a few lines; exit code 1 for a run that has failed or whose job is held."""
    path = folder.open(invocation.arguments[0], config.folder).path
    trained = folder.load_config(path)
    progress, beats = read_progress(path), read_beats(path)
    word = stand(path, progress, beats, trained.health.heartbeat)
    found, said = describe_jobs(path, word)
    alive = [job for job in found if job.alive]
    word = judge(word, found)
    print(f"{path}: {word}")
    lines = [*said, *describe_progress(trained, progress, word), *describe_state(path)]
    lines += describe_ranks(path, beats, trained.health.heartbeat) if progress.ending is None else []
    print("\n".join(lines))
    held = any(each in job.reason for job in alive for each in HELD)
    return int(word in FAILED or held)


def describe_progress(config: RunConfig, progress: Progress, word: str) -> list[str]:
    """Steps, losses, time."""
    if not progress.step:
        return [f"steps    none of {config.run.steps}"]
    parts = [f"steps    {progress.step} of {config.run.steps} ({progress.step / config.run.steps:.0%})"]
    parts += [] if progress.loss is None else [f"loss {progress.loss:.4f}"]
    parts += [] if progress.seconds is None else [f"{progress.seconds:.3g} s a step"]
    left = forecast(config, progress)
    if left is not None and progress.ending is None:
        parts.append(f"{write_time(left)} left" + ("" if word == "running" else " once it runs"))
    lines = ["  ".join(parts)]
    if progress.held_out is not None:
        lines.append(f"held out loss {progress.held_out[1]:.4f} after step {progress.held_out[0]}")
    if progress.checkpoint is not None:
        lines.append(f"kept     a checkpoint after step {progress.checkpoint}")
    return lines


def describe_state(run: Path) -> list[str]:
    """What the job's supervisor said last, and how often the run was started anew."""
    state = read_state(run)
    lines = []
    if state:
        age = write_age(time.time() - float(state.get("time", 0)) / 1e9)
        lines.append(f"last     {state.get('words') or state.get('state')} ({age} ago, on {state.get('node')})")
        if state.get("attempt") or state.get("restarts"):
            lines.append(
                f"again    requeued {state.get('attempt', 0)} times, ranks restarted {state.get('restarts', 0)} times"
            )
    before = len(list((run / "before").glob("[0-9]*")))
    if before:
        lines.append(f"before   {before} earlier attempt{'s' * (before > 1)}: {run / 'before'}")
    return lines


def describe_ranks(run: Path, beats: dict[int, Beat], heartbeat: float | None) -> list[str]:
    """Who does what, who is silent, and who died of what."""
    now, lines = time.time(), []
    alive = {rank: beat for rank, beat in beats.items() if is_alive({rank: beat}, heartbeat)}
    if alive:
        lines.append(f"ranks    {len(alive)} of {len(list_ranks(run))} give signs of life")
        for rank, beat in list(alive.items())[:MANY]:
            waits = " (waits for others)" if beat.waiting else ""
            lines.append(f"         rank {rank} on {beat.node}: {beat.action or 'begins'}{waits}")
    silent = [rank for rank in beats if rank not in alive]
    if silent and alive:
        shown = ", ".join(map(str, silent[:MANY])) + (" ..." if len(silent) > MANY else "")
        lines.append(f"         no sign of life of rank {shown}")
    elif beats and not alive:
        newest = max(beat.time for beat in beats.values()) / 1e9
        lines.append(f"ranks    no sign of life for {write_age(now - newest)}")
    if verdict := read_verdict(run):
        lines.append(f"verdict  {verdict.words}")
    elif endings := read_endings(run):
        first = endings[0]
        words = first.error.splitlines()[0] if first.error else "no exception"
        lines.append(f"died     rank {first.rank} on {first.node} first, in {first.action}: {words}")
        lines.append(f"         {len(endings)} ranks left last words: {run / 'logs'}/rank*/record.json")
    return lines


if __name__ == "__main__":
    sys.exit(cli.main(["status", *sys.argv[1:]]))
