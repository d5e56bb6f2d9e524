"""A run's checkpoints, on disk or in a store of objects: which there are, which are whole, which go.

    checkpoints/00000100/manifest.json       a checkpoint: there since its manifest was renamed into place
    checkpoints/00000200/00003.safetensors   one that is being written, or whose writing was cut off: never loaded
    checkpoints/00000150.damaged/            one that could not be loaded: set aside, never loaded

Numbers count the steps taken.
"""

import errno
import os
import re
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.checkpoint import place
from training.checkpoint.facts import check_facts
from training.checkpoint.manifest import MANIFEST, DamagedError, Manifest, parse
from training.checkpoint.place import Place

FOLDER = "checkpoints"  # in a run's


def find_root(folder: str | None, run: Path) -> Place:
    """Where the run in the folder ``run`` has its checkpoints; ``folder`` is ``checkpoint.folder``.

    Raises ValueError as ``training.checkpoint.store.at``.
    """
    return run / FOLDER if folder is None else place.parse(folder) / run.name


def locate(root: Place, step: int) -> Place:
    """The folder of the checkpoint after so many steps."""
    return root / f"{step:08}"


def find(root: Place) -> list[int]:
    """The steps of all checkpoints that are there, ascending."""
    return sorted(step for step, path in _list(root) if (path / MANIFEST).exists())


def find_begun(root: Place) -> list[int]:
    """The steps of those that were begun and are not there yet, or never will be."""
    return sorted(step for step, path in _list(root) if not (path / MANIFEST).exists())


def read_manifest(folder: Place) -> Manifest:
    """Of a checkpoint. Raises DamagedError where none is whole there, UnreachableError where nobody can tell."""
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise place.explain(error, str(path)) from error
    except UnicodeDecodeError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    manifest = parse(text, str(path))
    manifest.check(str(path))
    check_facts(manifest, str(path))
    return manifest


def sweep(root: Place) -> list[Place]:
    """Removes what was never committed; returns what that was."""
    begun = [locate(root, step) for step in find_begun(root)]
    for path in begun:
        place.remove(path)
    return begun


def set_aside(path: Place) -> Place:
    """Takes a damaged checkpoint out of the way of those that load, and of the one that will be written there."""
    for number in range(1, 1000):
        aside: Any = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            return path.rename(aside)
    raise AssertionError(path)


def find_damaged(root: Place) -> list[Place]:
    """The checkpoints that were set aside."""
    return sorted((path for path in _look(root) if ".damaged" in path.name), key=str)


def prune(root: Place, last: int, every: int = 0, best: Collection[int] = ()) -> list[int]:
    """Removes all checkpoints but the ``last`` ones, those of every so many steps, and those after the steps ``best``.
    Returns the steps removed.

    What cannot be removed stays.
    """
    steps = find(root)
    gone = [step for step in steps[:-last] if (not every or step % every) and step not in best]
    for step in gone:
        with suppress(OSError):
            (locate(root, step) / MANIFEST).unlink()  # first: what is left of a removal that was cut off is swept
            discard(locate(root, step))
    return gone


def discard(folder: Place) -> None:
    """Removes what is no checkpoint, or no longer one, as far as it goes."""
    place.remove(folder, ignore_errors=True)


def _list(root: Place) -> list[tuple[int, Place]]:
    return [(int(path.name), path) for path in _look(root) if re.fullmatch(r"\d{8,}", path.name, re.ASCII)]


def _look(root: Place) -> Iterator[Place]:
    """What is in ``root``; nothing where it is not there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        yield from root.iterdir()


def make_own(folder: Path) -> None:
    """Makes ``folder``, where others may make some too. Raises OSError, PermissionError where one of them has made it:
    who owns a folder puts into it, and reads there, what they like.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not is_own(folder):
        raise PermissionError(errno.EACCES, "is not this user's own folder: remove it, or use another one", str(folder))


def is_own(folder: Path) -> bool:
    """Whether it is a folder, not a link to one, of this user, into which nobody else may write."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
