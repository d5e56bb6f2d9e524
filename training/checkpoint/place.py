"""Where a run's checkpoints lie, and what is not the same in a folder and in a store of objects.

    runs/one/checkpoints/00000100/manifest.json     pathlib.Path
    s3://bucket/kept/one/00000100/manifest.json     training/checkpoint/store.py

A file is there once it has been synced and renamed. An object is there once it is whole, which is as good.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.checkpoint.direct import Direct
from training.checkpoint.manifest import DamagedError
from training.checkpoint.store import Remote, UnreachableError, Upload, at

Place = Path | Remote
# What a file that is gone, or a disk that is broken, answers; whatever else goes wrong may be well the next time.
DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.ENXIO, errno.EBADMSG, errno.EUCLEAN}


def parse(text: str) -> Place:
    """The place that a path or a URL stands for. Raises ValueError as ``training.checkpoint.store.at``."""
    return at(text) if "://" in text else Path(text)


def try_out(root: Place) -> None:
    """Raises UnreachableError where a store takes no object, or does not let it go. A folder says so in time."""
    if isinstance(root, Remote):
        (root / "tried").write_bytes(b"out")
        (root / "tried").unlink()


@contextmanager
def create(path: Place) -> Iterator[Direct | Upload]:
    """What is written, from its beginning to its end, is there for good once this is left without an error."""
    if isinstance(path, Remote):
        with path.create() as upload:
            yield upload
        return
    file = Direct(path)
    try:
        yield file
        file.finish()
    finally:
        file.close()


def replace_text(path: Place, text: str) -> None:
    """``path`` has ``text``, and does so after a crash too; before, it has all of what it had."""
    if isinstance(path, Remote):
        path.write_bytes(text.encode())
        return
    partial = path.with_name(f"{path.name}.partial")
    with create(partial) as file:
        file.write(text.encode())
    partial.replace(path)
    sync(path.parent)


def sync(folder: Place) -> None:
    """What was made or renamed in ``folder`` is there after a crash too."""
    if isinstance(folder, Path):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def remove(folder: Place, ignore_errors: bool = False) -> None:
    """Takes away ``folder`` and all that is in it. Raises OSError; with ``ignore_errors`` leaves what does not go."""
    if isinstance(folder, Path):
        shutil.rmtree(folder, ignore_errors)
        return
    try:
        folder.remove()
    except UnreachableError:
        if not ignore_errors:
            raise


def explain(error: OSError, where: str) -> ValueError:
    """What to raise where ``where`` cannot be read: DamagedError, or UnreachableError where it may be all right."""
    if error.errno in DAMAGE and not isinstance(error, UnreachableError):
        return DamagedError(f"{where} cannot be read: {error}")
    return UnreachableError(error.errno, error.strerror, where)
