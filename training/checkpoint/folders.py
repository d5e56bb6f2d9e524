"""A run's checkpoints on disk: which there are, which are whole, which go.

    checkpoints/00000100/manifest.json       a checkpoint: there since its manifest was renamed into place
    checkpoints/00000200/00003.safetensors   one that is being written, or whose writing was cut off: never loaded
    checkpoints/00000150.damaged/            one that could not be loaded: set aside, never loaded

Numbers count the steps taken.
"""

import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from training.checkpoint.manifest import MANIFEST, DamagedError, Manifest, parse

FOLDER = "checkpoints"  # in a run's


def locate(root: Path, step: int) -> Path:
    """The folder of the checkpoint after so many steps."""
    return root / f"{step:08}"


def find(root: Path) -> list[int]:
    """The steps of all checkpoints that are there, ascending."""
    return sorted(step for step, path in _list(root) if (path / MANIFEST).exists())


def read_manifest(folder: Path) -> Manifest:
    """Of a checkpoint that is there. Raises DamagedError where it is not, or is none."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    manifest = parse(text, str(path))
    manifest.check(str(path))
    return manifest


def sweep(root: Path) -> list[Path]:
    """Removes what was never committed; returns what that was."""
    started = [path for _, path in _list(root) if not (path / MANIFEST).exists()]
    for path in started:
        shutil.rmtree(path)
    return started


def set_aside(path: Path) -> Path:
    """Takes a damaged checkpoint out of the way of those that load, and of the one that will be written there."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            return path.rename(aside)
    raise AssertionError(path)


def find_damaged(root: Path) -> list[Path]:
    """The checkpoints that were set aside."""
    return sorted(root.glob("*.damaged*"))


def prune(root: Path, last: int, every: int = 0) -> list[int]:
    """Removes all checkpoints but the ``last`` ones and those of every so many steps. Returns the steps removed.

    What cannot be removed stays.
    """
    steps = find(root)
    gone = [step for step in steps[:-last] if not every or step % every]
    for step in gone:
        with suppress(OSError):
            (locate(root, step) / MANIFEST).unlink()  # first: what is left of a removal that was cut off is swept
        discard(locate(root, step))
    return gone


def discard(folder: Path) -> None:
    """Removes what is no checkpoint, or no longer one."""
    shutil.rmtree(folder, ignore_errors=True)


def _list(root: Path) -> Iterable[tuple[int, Path]]:
    paths = root.iterdir() if root.is_dir() else ()
    return [(int(path.name), path) for path in paths if re.fullmatch(r"\d{8,}", path.name, re.ASCII)]
