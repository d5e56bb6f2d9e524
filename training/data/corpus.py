"""Which text there is: sources, their documents in a fixed order, and which of them are held out.

    data.corpus -> sources -> documents (path, byte range) -> train | held_out

A document is a file; a file of many records (training/data/records.py) is many. Folders are walked in the order of
their names, which depends on nothing but the names. A file of a folder is held out if a hash of its path inside the
folder says so, so adding or removing other files moves nothing from one side to the other. A file that is named itself
may be all the text there is: it is cut in two, and its end is held out. Records are held out by a hash of their text,
so that one that is there twice is on one side: a file of them is in both splits, and whoever reads it chooses.

Nothing here holds more than one folder's names in memory.
"""

import json
import os
import stat
import sysconfig
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

from training.data.config import STDLIB

SUFFIXES = (".md", ".py", ".rst", ".text", ".txt")  # what is text in a folder; a file named itself always is
LINES = (".jsonl", ".ndjson")
PACKED = (".gz", ".zst")
RECORDS = (*LINES, *(line + packed for line in LINES for packed in PACKED), ".parquet", ".arrow")
MADE = "train.documents.jsonl"  # in a folder that `prepare` made, and that is no text
NOT_STDLIB = ("site-packages", "dist-packages")  # installed later, below the standard library's folder
WINDOW = 1 << 16  # bytes searched for a line break to cut at


class Source(NamedTuple):
    """One entry of data.corpus. ``root`` is a folder, or the file itself."""

    name: str
    root: Path


class Document(NamedTuple):
    """The bytes ``start`` to ``stop`` of a file that had ``size`` bytes and was written at ``mtime`` (ns)."""

    source: int
    path: str  # relative to the source's root, "/" between names; "" where the root is the file, of records its name
    start: int
    stop: int
    size: int
    mtime: int

    def to_row(self) -> bytes:
        """One line of JSON."""
        return json.dumps(self).encode() + b"\n"

    @classmethod
    def from_row(cls, row: bytes) -> "Document":
        return cls(*json.loads(row))

    @property
    def has_records(self) -> bool:
        """Whether it is a file of many documents."""
        return self.path.endswith(RECORDS)

    def locate(self, root: Path) -> Path:
        """Its file; ``root`` is that of its source."""
        return root if not self.path or (self.has_records and root.is_file()) else root / self.path


def find_sources(names: Iterable[str]) -> tuple[Source, ...]:
    """The folders and files that data.corpus names.

    Raises:
        ValueError: a path does not exist, or is named twice.
    """
    sources: list[Source] = []
    for name in names:
        root = Path(sysconfig.get_path("stdlib") if name == STDLIB else name).expanduser().resolve()
        if not root.is_file() and not root.is_dir():
            raise ValueError(f"data.corpus={name}: no such file or folder, and not {STDLIB!r}")
        if any(root == other.root for other in sources):
            raise ValueError(f"data.corpus={name} is named twice: each text counts once")
        sources.append(Source(name, root))
    return tuple(sources)


def list_documents(sources: tuple[Source, ...], held_out: float) -> Iterator[tuple[str, Document]]:
    """Every document with its split, "train" or "held_out", in a fixed order. Empty files are left out."""
    for number, (name, root) in enumerate(sources):
        skipped = NOT_STDLIB if name == STDLIB else ()
        suffixes = (".py",) if name == STDLIB else (*SUFFIXES, *RECORDS)
        if root.is_file():
            records = root.name.endswith(RECORDS)
            yield from _both(number, root.name, root.stat()) if records else _halve(number, root, held_out)
            continue
        for path in _walk(str(root), "", suffixes, skipped):
            try:
                status = os.stat(f"{root}/{path}")
            except FileNotFoundError:  # a link to nowhere
                continue
            if not status.st_size or not stat.S_ISREG(status.st_mode):
                continue
            if path.endswith(RECORDS):
                yield from _both(number, path, status)
            else:
                split = "held_out" if is_held_out(os.fsencode(path), held_out) else "train"
                yield split, Document(number, path, 0, status.st_size, status.st_size, status.st_mtime_ns)


def is_held_out(name: bytes, share: float) -> bool:
    """Whether a document is among the ``share`` that is held out: by its path (relative), a record by its text."""
    digest = blake2b(name, digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def cut(descriptor: int, offset: int, start: int, stop: int) -> int:
    """Where a text is cut near byte ``offset`` of ``start``..``stop``: after the next line break or, where none is
    near, before the next character (never inside one)."""
    if offset <= start or offset >= stop:
        return min(max(offset, start), stop)
    window = os.pread(descriptor, min(WINDOW, stop - offset), offset)
    line_break = window.find(b"\n")
    if line_break >= 0 and offset + line_break + 1 < stop:
        return offset + line_break + 1
    continuation = 0
    while continuation < min(3, len(window)) and window[continuation] & 0xC0 == 0x80:
        continuation += 1
    return offset + continuation


def _both(number: int, path: str, status: os.stat_result) -> Iterator[tuple[str, Document]]:
    """A file of records."""
    document = Document(number, path, 0, status.st_size, status.st_size, status.st_mtime_ns)
    if status.st_size:
        yield from (("train", document), ("held_out", document))


def _halve(number: int, root: Path, held_out: float) -> Iterator[tuple[str, Document]]:
    descriptor = os.open(root, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        middle = cut(descriptor, int(status.st_size * (1 - held_out)), 0, status.st_size)
    finally:
        os.close(descriptor)
    for split, start, stop in (("train", 0, middle), ("held_out", middle, status.st_size)):
        if start < stop:
            yield split, Document(number, "", start, stop, status.st_size, status.st_mtime_ns)


def _walk(root: str, inside: str, suffixes: tuple[str, ...], skipped: tuple[str, ...]) -> Iterator[str]:
    """Paths of text files, relative to ``root``, by name. Hidden names and links to folders are passed over."""
    with os.scandir(f"{root}/{inside}") as entries:
        names = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    if (MADE, False) in names:
        return
    for name, is_folder in names:
        path = f"{inside}/{name}" if inside else name
        # `datasets` keeps what it computed, such as filtered copies, beside a set.
        if name.startswith(".") or name in skipped or (name.startswith("cache-") and name.endswith(".arrow")):
            continue
        if is_folder:
            yield from _walk(root, path, suffixes, skipped)
        elif name.endswith(suffixes):
            yield path
