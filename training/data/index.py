"""The index of a folder of token files: what it was made from, which files it has, and their checksums.

    index.json = {format, sources, identity, dtype, eos, splits: {train: [shards], held_out: [shards]}, digest}

A folder is complete once its index exists. ``identity`` is what the tokens were made from, ``digest`` what they are:
the same text prepared elsewhere, or touched and prepared again, has the same digest, which names the data in a run's
record.
"""

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.data.listing import SPLITS
from training.data.tokens import Shard, TokenFile

NAME = "index.json"
FORMAT = 1
REPAIR = "delete the file and run `shoestring prepare` again: only what is missing is made anew"
READ = 1 << 20  # bytes checksummed at once


class Index(NamedTuple):
    """What index.json holds."""

    sources: list[str]  # where the text lay
    identity: dict[str, Any]  # corpus (digest and counts of its listing), tokenizer, held_out, piece
    dtype: str  # as numpy writes it
    eos: int
    splits: dict[str, list[Shard]]

    @property
    def digest(self) -> str:
        """Changes with any token."""
        return digest([self.dtype, self.eos, self.splits])

    def open(self, folder: Path, split: str) -> TokenFile:
        """The tokens of a split."""
        return TokenFile(folder, self.splits[split], np.dtype(self.dtype), self.eos)


def digest(content: Any) -> str:
    """32 hexadecimal digits that change with any value in ``content`` (JSON)."""
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_index(folder: Path, index: Index) -> None:
    """Commits the folder: written beside, then renamed."""
    partial = folder / f"{NAME}.partial"
    with partial.open("w") as file:
        splits = {split: [shard._asdict() for shard in shards] for split, shards in index.splits.items()}
        content = {"format": FORMAT, **index._asdict(), "splits": splits, "digest": index.digest}
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / NAME)


def read_index(folder: Path) -> Index:
    """The index of ``folder``.

    Raises:
        ValueError: it is damaged, or of another format.
        FileNotFoundError: there is none.
    """
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
        expected = content.pop("digest")
        version = content.pop("format")
        rows = content.pop("splits")
        index = Index(**content, splits={split: [Shard(**row) for row in rows[split]] for split in SPLITS})
        damaged = index.digest != expected or index.dtype not in ("<u2", "<u4")
    except (ValueError, TypeError, KeyError, AttributeError):
        damaged = True
    if damaged:
        raise ValueError(f"{path} is damaged: delete its folder and run `shoestring prepare` again")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}, not {FORMAT}: delete its folder and prepare again")
    return index


def verify(folder: Path, index: Index, budget: float) -> int:
    """Checks the size of every token file, and the checksums of as many as fit in ``budget`` bytes, evenly spread.

    Returns:
        How many bytes were checksummed.

    Raises:
        ValueError: names the first file that is missing, too short, too long or corrupted.
    """
    itemsize = np.dtype(index.dtype).itemsize
    shards = [shard for split in SPLITS for shard in index.splits[split]]
    for shard in shards:
        _check_size(folder / shard.file, shard.count_bytes(itemsize))
    total = sum(shard.count_bytes(itemsize) for shard in shards)
    chosen = _spread(shards, min(1.0, budget / max(1, total)))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for shard, found in zip(chosen, threads.map(lambda s: _checksum(folder / s.file), chosen), strict=True):
            if found != shard.crc32:
                raise ValueError(
                    f"{folder / shard.file} is corrupted: its checksum is {found:08x}, not {shard.crc32:08x}. {REPAIR}"
                )
    return sum(shard.count_bytes(itemsize) for shard in chosen)


def _check_size(path: Path, expected: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing. Run `shoestring prepare` with the text as data.corpus: only that file is made anew"
        ) from None
    if size != expected:
        change = "truncated" if size < expected else "too long"
        raise ValueError(f"{path} is {change}: it has {size} bytes, not {expected}. {REPAIR}")


def _spread(shards: Sequence[Shard], share: float) -> list[Shard]:
    """``share`` of the shards, every so-manieth; all of them where it reaches 1."""
    count = int(share * len(shards))
    return [shards[i * len(shards) // count] for i in range(count)]


def _checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        buffer = memoryview(bytearray(READ))
        while size := file.readinto(buffer):
            crc = zlib.crc32(buffer[:size], crc)  # releases the interpreter's lock
    return crc
