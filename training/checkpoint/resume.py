"""Finds the checkpoint that a run goes on from: the newest that is whole, on every rank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from parallel.doing import doing
from training.agree import sum_over, tell
from training.checkpoint import folders, nearest
from training.checkpoint.manifest import DamagedError
from training.checkpoint.state import Progress, accept, read
from training.checkpoint.store import KEY, UnreachableError
from training.metrics import Record
from training.picture import describe_schedule, draw_schedule, simulate_step
from training.setup import Setup


def go_on(setup: Setup, folder: Path, record: Record, note: Callable[[str], None]) -> tuple[Setup, Progress]:
    """``setup`` and how far it has come, as the newest good checkpoint in ``folder`` has it. Collective.

    Where there is none, both are as they began. The record forgets what was done after it, and says what the run is.
    Raises as ``resume``.
    """
    found = resume(setup, folder, note)
    progress, tokens = found or (Progress(), 0)
    nearest.sweep(setup, folder, progress.step)
    record.rewind(progress.step)
    if found:
        note(f"goes on after step {progress.step} and {tokens:,} tokens")
        record.write("resume", step=progress.step, tokens=tokens)
    if setup.mesh.rank == 0:
        timeline = simulate_step(setup.config, setup.mesh)
        record.write("start", **setup.facts(), **describe_schedule(timeline, setup.config))
        draw_schedule(timeline, folder)
    sequences = -(-tokens // setup.config.data.sequence_length)
    return replace(setup, schedule=setup.schedule.resume(progress.step, sequences)), progress


@doing("loading a checkpoint")
def resume(setup: Setup, folder: Path, note: Callable[[str], None]) -> tuple[Progress, int] | None:
    """Puts the state of the newest good checkpoint in ``folder``, the run's, into ``setup``. Collective.

    Returns how far the run has come, in steps and in tokens; None if there is no checkpoint at all. One that is damaged
    is set aside, with a word about what is wrong with it, and the one before it is tried. Raises ValueError where there
    were some and none is good, for then going on would be to begin again, and for a checkpoint of another model;
    on every rank, where a place does not answer to one of them, which is no reason to set anything aside.
    """
    root, first = folders.find_root(setup.config.checkpoint.folder, folder), setup.mesh.rank == 0
    if first:
        for path in folders.sweep(root):
            note(f"{path} was never completed: removed")
    if near := nearest.resume(setup, folder, note):
        return near
    while (step := _newest(setup, root)) is not None:
        place, error = folders.locate(root, step), ""
        try:
            manifest = folders.read_manifest(place)
            read(setup, place, manifest)
        except DamagedError as damage:
            error = f"rank {setup.mesh.rank}: {damage}"
        except UnreachableError as reason:
            error = str(reason)
        if not (reasons := tell(setup.mesh, error)):
            return accept(setup, manifest), int(manifest.run["tokens"])
        if unknown := [reason for reason in reasons if reason.startswith(f"{KEY}:")]:
            raise ValueError(unknown[0])
        aside = folders.set_aside(place) if first else place
        note(f"the checkpoint after step {step} cannot be loaded and is now {aside}: {'; '.join(reasons)}")
    if refused := tell(setup.mesh, _refuse(root) if first else ""):
        raise ValueError(refused[0])
    return None


def _refuse(root: folders.Place) -> str:
    """Why a run whose checkpoints were all set aside does not begin again; "" if it has none."""
    aside = ", ".join(path.name for path in folders.find_damaged(root))
    return aside and (
        f"{root} has no checkpoint that can be loaded, but {aside}: see what is wrong with it above; begin anew with "
        "another run.id, or in this one by removing that folder"
    )


def _newest(setup: Setup, root: folders.Place) -> int | None:
    """The step of the newest checkpoint, as rank 0 sees it once it has put the folder in order."""
    steps = folders.find(root) if setup.mesh.rank == 0 else []
    found = int(sum_over(torch.tensor(steps[-1] + 1 if steps else 0, device=setup.mesh.device), setup.mesh))
    return found - 1 if found else None
