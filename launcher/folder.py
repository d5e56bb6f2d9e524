"""A run's folder, keyed by the run's id.

runs/<id>/config.yaml     the configuration, resolved
         command.txt      the command line, quoted for a shell
         versions.json    python, torch, packages, git revision, platform
         proof.json       the proof that a run of several ranks started with, or that it had none
         metrics.jsonl    the record (training writes it)
         attempt          whose the run is: older attempts at it write no checkpoint (training/checkpoint/fence.py)
         ledger.jsonl     where the time of its attempts went (training writes it)
         schedule.svg     of a pipeline, what each rank does when; schedule.txt its lists (training writes them)
         logs/rank0/ ...  what each rank printed, if there were several
         weights/         the final save (training writes it)
         checkpoints/     what the run can go on from (training writes it; docs/checkpoint-format.md);
                          elsewhere with checkpoint.folder
         report.html      a page on it all (shoestring report)
         excluded.json    machines that preflight has found unfit, each with why: the next attempt is to do without
         before/1/ ...    the first four and the logs as they were before the run went on
         job.sbatch       under Slurm: the script of its jobs, jobs.jsonl: their numbers, job-*.out: what Slurm printed
"""

import json
import shlex
import shutil
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import RunConfig
from launcher.invocation import Invocation
from launcher.keys import nearest
from launcher.versions import versions
from training.checkpoint import fence, folders, place

DESCRIBING = ("config.yaml", "command.txt", "versions.json", "proof.json", "logs")


class RunFolder(NamedTuple):
    """Where a run keeps its things."""

    path: Path

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def ending(self) -> str | None:
        """How the record says that the run ended; None where it does not."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        last = json.loads(lines[-1]) if lines else {}
        return str(last["ending"]) if last.get("kind") == "end" else None


def create(config: RunConfig, invocation: Invocation, proof: dict[str, Any] | None = None) -> Path:
    """Makes the folder of a new run and writes down what it is. ``ValueError`` if ``run.id`` is taken.

    With ``checkpoint.resume=auto`` a run that is there goes on, and what it was is kept beside what it is now.
    ``proof`` is what launcher/gate.py says of it; None where a run needs none.
    """
    path = _claim(config)
    try:
        _check_checkpoints(config, path)
    except ValueError:
        if not any(path.iterdir()):
            path.rmdir()  # it is new
        raise
    set_aside(path)
    fence.claim(path, fence.name_attempt())
    (path / "config.yaml").write_text(invocation.yaml)
    (path / "command.txt").write_text(shlex.join(invocation.command) + "\n")
    (path / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    if proof is not None:
        (path / "proof.json").write_text(json.dumps(proof, indent=2) + "\n")
    return path


def discard_unstarted(path: Path) -> None:
    """Removes the folder of a run that has recorded nothing: its id is free for the next try. What says which machines
    that is to do without stays."""
    from launcher.preflight.unfit import EXCLUDED

    record = RunFolder(path).metrics
    if (not record.exists() or not record.stat().st_size) and not (path / EXCLUDED).exists():
        shutil.rmtree(path)


def open(run: str, folder: str = "runs") -> RunFolder:  # `folder.open` reads well, and the builtin is not needed here
    """The folder of an existing run, given its path or its id under ``folder``."""
    for path in (Path(run), Path(folder) / run):
        if (path / "config.yaml").is_file():
            return RunFolder(path)
    runs = [path.parent.name for path in sorted(Path(folder).glob("*/config.yaml"))]
    raise ValueError(f"run={run} must be a run's folder or the id of a run in {folder}/{nearest(run, runs)}")


def load_config(folder: Path) -> RunConfig:
    """The configuration a run was started with."""
    from launcher.tree import load  # loads OmegaConf, which help and completion do without

    return load(folder / "config.yaml")


def find_checkpoints(path: Path) -> place.Place:
    """Where the run in ``path`` has its checkpoints. Raises ValueError where that cannot be told."""
    return folders.find_root(load_config(path).checkpoint.folder, path)


def set_aside(path: Path, names: tuple[str, ...] = DESCRIBING) -> None:
    """Moves what described a run, or its logs alone, to ``before/``: the run goes on."""
    old = [path / name for name in names if (path / name).exists()]
    if old:
        before = next(place for number in count(1) if not (place := path / "before" / str(number)).exists())
        before.mkdir(parents=True)
        for each in old:
            each.rename(before / each.name)


def locate(config: RunConfig, number: int = 1) -> Path:
    """Where the folder of a run lies, by ``run.id``, or of one that starts now, the ``number``-th of this second."""
    stem = config.run.id or f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}"
    return Path(config.run.folder) / (stem if number == 1 else f"{stem}-{number}")


def _claim(config: RunConfig) -> Path:
    """Makes the folder itself; that is atomic, so two runs that start in the same second get two folders."""
    given = config.run.id
    Path(config.run.folder).mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = locate(config, number)
        try:
            path.mkdir()
        except FileExistsError:
            if given and config.checkpoint.resume == "auto":
                return path
            if given:
                raise ValueError(
                    f"run.id={given} is taken: {path} exists; choose another id, move that folder, or go on with that "
                    "run by checkpoint.resume=auto"
                ) from None
            continue
        return path
    raise AssertionError("counting never ends")


def _check_checkpoints(config: RunConfig, path: Path) -> None:
    """Raises ValueError where the run cannot have its checkpoints, has them elsewhere, or would have another run's."""
    here = config.checkpoint.folder
    if (path / "config.yaml").is_file() and (there := load_config(path).checkpoint.folder) != here:
        raise ValueError(
            f"checkpoint.folder={here} must be {there}, where run.id={path.name} has its checkpoints: to go on "
            f"elsewhere, move them, and say so in {path / 'config.yaml'}"
        )
    root = folders.find_root(here, path)
    if config.checkpoint.resume == "never" and folders.find(root):
        raise ValueError(
            f"run.id={path.name} is taken: {root} has its checkpoints; choose another id, remove them, or go on with "
            "that run by checkpoint.resume=auto"
        )
    place.try_out(root)
