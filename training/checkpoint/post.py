"""Near copies on their way from one rank to another: a file and its manifest, over a group of their own.

    sizes [2] int64  |  the file, in blocks  |  the manifest, in blocks          no copy: two zeros

Every block is ``BLOCK`` bytes, the last ones filled up. Who cannot write goes on receiving, who cannot read goes on
sending zeros, which no manifest is: nobody waits for a disk that is full or broken.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from model.shards import view_bytes
from training.checkpoint.files import name_file
from training.checkpoint.folders import make_own
from training.checkpoint.near import name_manifest

BLOCK = 2**20  # bytes of a message


def send(folder: Path, owner: int, to: int, group: dist.ProcessGroup) -> None:
    """Sends the copy of ``owner`` in ``folder`` to global rank ``to``, if there is one: which it hears too.

    Raises OSError where it cannot be read, once all has been sent.
    """
    failures: list[OSError] = []
    with ExitStack() as stack:
        try:
            paths = [folder / name_file(owner), folder / name_manifest(owner)]
            files = [stack.enter_context(path.open("rb")) for path in paths]
        except OSError:
            files = []
        sizes = [path.stat().st_size for path in paths] if files else [0, 0]
        dist.send(torch.tensor(sizes), to, group=group)
        block = torch.zeros(BLOCK, dtype=torch.uint8)
        for file, size in zip(files, sizes, strict=False):
            for start in range(0, size, BLOCK):
                if not failures:
                    try:
                        found = file.readinto(view_bytes(block)[: size - start])
                        if found < min(BLOCK, size - start):
                            raise OSError(errno.EIO, f"ended {size - start - found} bytes early", file.name)
                    except OSError as error:
                        failures.append(error)
                        block.zero_()
                dist.send(block, to, group=group)
    for failure in failures:
        raise failure


def receive(folder: Path, owner: int, source: int, group: dist.ProcessGroup) -> None:
    """Puts what ``send`` sends on global rank ``source`` into ``folder``. Raises OSError where it cannot be written."""
    sizes = torch.zeros(2, dtype=torch.int64)
    dist.recv(sizes, source, group=group)
    if not sizes[0]:
        return
    arriving = _arrive(sizes.tolist(), source, group)
    manifest = folder / name_manifest(owner)
    partial = manifest.with_suffix(".partial")
    try:
        make_own(folder.parent.parent)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name_file(owner)).open("wb") as file, partial.open("wb") as text:
            for index, content in arriving:
                (file, text)[index].write(content)
        partial.replace(manifest)
    except OSError:
        for _ in arriving:
            pass
        raise


def _arrive(sizes: Sequence[int], source: int, group: dist.ProcessGroup) -> Iterator[tuple[int, memoryview]]:
    """Which of the two files, and the next bytes of it: good until the next ones are asked for."""
    block = torch.zeros(BLOCK, dtype=torch.uint8)
    for index, size in enumerate(sizes):
        for start in range(0, size, BLOCK):
            dist.recv(block, source, group=group)
            yield index, view_bytes(block)[: size - start]
