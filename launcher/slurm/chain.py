"""The folder of a run that is submitted: a new one, or that of a run which goes on, perhaps behind a job of its own."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from launcher import folder
from launcher.invocation import Invocation
from launcher.ranks import describe, differ
from launcher.slurm import jobs, queue
from launcher.slurm.reasons import STATES
from training.config import Resume


def open_folder(config: RunConfig, invocation: Invocation, proof: dict[str, Any] | None) -> tuple[Path, bool]:
    """The folder of a run, and whether it was there: one whose job waits or runs is left as it is, for a chain."""
    path = Path(config.run.folder) / (config.run.id or "")
    if config.run.id is None or not (path / "config.yaml").is_file():
        return folder.create(config, invocation, proof), False
    known = [each.job for each in jobs.read(path)]
    alive = [job for job in queue.look_up(known).values() if job.alive]
    if not alive:
        return folder.create(config, invocation, proof), True
    named = f"run.id={config.run.id} has job {alive[-1].id}, which is {STATES[alive[-1].state]}"
    if config.cluster.dependency is None:
        raise ValueError(
            f"{named}: end it by `shoestring cancel {config.run.id}`, or let this job go on after it by "
            f"cluster.dependency=afterany:{alive[-1].id}"
        )
    if (key := _differ(config, folder.load_config(path))) is not None:
        raise ValueError(
            f"{key} must be what it is in {path / 'config.yaml'}: {named}, and jobs of a chain are one run"
        )
    return path, True


def _differ(one: RunConfig, other: RunConfig) -> str | None:
    """The first key in which two jobs of a chain differ, besides what each says of its place in it."""
    alike = [
        replace(
            each,
            checkpoint=replace(each.checkpoint, resume=Resume.auto),
            cluster=replace(each.cluster, dependency=None),
        )
        for each in (one, other)
    ]
    return None if asdict(alike[0]) == asdict(alike[1]) else differ(describe(alike[0]), describe(alike[1]))[0]
