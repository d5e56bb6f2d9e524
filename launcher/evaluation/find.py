"""What there is to measure: kept weights, the configuration of their run, and where the result goes.

a run, by path or id     its newest checkpoint, or the one after step=...; without any, the weights at its end
a checkpoint's folder    that one; where it lies in no run's folder, its configuration is what its manifest says
"""

from pathlib import Path
from typing import NamedTuple

from configs.schema import RunConfig
from launcher import folder
from launcher.checkpoint import choose
from launcher.evaluation.config import Config
from launcher.standing import read_progress
from training.checkpoint import folders
from training.checkpoint.manifest import MANIFEST
from training.checkpoint.place import Place, parse
from training.kept import Kept


class Found(NamedTuple):
    """Kept weights."""

    kept: Kept
    config: RunConfig  # that they were trained with
    home: Path  # the folder that has, or gets, evaluations/


def find(name: str, config: Config) -> Found:
    """What ``name`` stands for. ValueError where that is nothing, or where it has no weights yet."""
    try:
        run = folder.open(name, config.folder)
    except ValueError as error:
        if not (parse(name) / MANIFEST).exists():
            raise ValueError(f"{error}; and it is no checkpoint's folder") from None
        return _find_checkpoint(parse(name), config)
    root = folder.find_checkpoints(run.path)
    if folders.find(root) or config.step is not None:
        step = choose(config.step, root)[-1]
        kept = Kept(str(folders.locate(root, step)), step, average=config.ema)
    elif config.ema:
        raise ValueError(f"ema=true needs a checkpoint, and {run.path} has none")
    elif run.weights.is_dir():
        kept = Kept(str(run.weights), read_progress(run.path).step, checkpoint=False)
    else:
        raise ValueError(f"{run.path} has no checkpoint yet, and no weights")
    return Found(kept, folder.load_config(run.path), run.path)


def _find_checkpoint(place: Place, config: Config) -> Found:
    if config.step is not None:
        raise ValueError(f"step={config.step} must be left out: {place} is the checkpoint of one step")
    manifest = folders.read_manifest(place)
    kept = Kept(str(place), int(manifest.run["step"]), average=config.ema)
    home = place.parent.parent if isinstance(place, Path) else None
    if home is not None and (home / "config.yaml").is_file():
        return Found(kept, folder.load_config(home), home)
    from launcher.tree import revive

    return Found(kept, revive(manifest.run["config"], str(place)), Path(config.folder))
