"""Files of many records, of which a field is the text: what there is of them in a piece of a file.

    *.jsonl, *.ndjson             a line a record; a piece has those that begin in its bytes
    the same with .gz or .zst     a stream, read from end to end: one piece
    *.parquet                     row groups; a piece has those that begin in its bytes
    *.arrow                       as `datasets` keeps them on disk, a stream of batches: one piece

A record is a document; it is held out by a hash of its text, so that a text that is there twice is on one side. What
is no record, or has no text, is named by its line (or row) and why. Parquet and Arrow need pyarrow, .zst zstandard.
"""

import gzip
import json
import mmap
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import IO, Any, NamedTuple

from training.data.corpus import LINES

BATCH = 1024  # rows in memory at once
COUNTED = 1 << 24  # bytes searched for line ends at once
CHUNK = 1 << 20  # bytes unpacked at once


class Bad(NamedTuple):
    """A record that is none. ``line``: its line, or row, from 1."""

    line: int
    why: str


class Place(NamedTuple):
    """A piece of a file of records: those that begin in ``start`` to ``stop``, which are counted in bytes."""

    path: Path
    start: int
    stop: int


class Wanted(NamedTuple):
    """Which field of a record, and what becomes of what is there: that in a tuple, or why it will not do."""

    field: list[str]
    take: Callable[[Any], tuple[Any] | str]


Found = Iterator[Any]  # what was wanted, or ``Bad``


def take_text(value: Any) -> tuple[str] | str:
    """A text, or why it is none."""
    if not isinstance(value, str):
        return "is no text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "has half a surrogate pair"
    return (value,)


def read_records(path: Path, piece: range, field: str, take: Callable[[Any], tuple[Any] | str] = take_text) -> Found:
    """What ``take`` makes of ``field`` of the records that begin in bytes ``piece`` of a file; and what is none.

    Raises:
        ValueError: what reads the format is not installed, or the file is not of it.
    """
    read = next(read for suffix, read in READERS.items() if path.name.endswith(suffix))
    return read(Place(path, piece.start, piece.stop), Wanted(field.split("."), take))


def _read_lines(place: Place, wanted: Wanted) -> Found:
    with place.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position, stop = _find_line(content, place.start), _find_line(content, place.stop)
        before: int | None = None  # lines, counted where one is to be named
        number = 0
        while position < stop:
            end = content.find(b"\n", position, stop)
            end = stop if end < 0 else end
            found = _read_line(content[position:end], wanted)
            position, number = end + 1, number + 1
            if isinstance(found, str):
                if before is None:
                    before = _count_lines(content, _find_line(content, place.start))
                yield Bad(before + number, found)
            elif found is not None:
                yield found[0]


def _find_line(content: mmap.mmap, offset: int) -> int:
    """Where the first line begins at byte ``offset`` or behind it."""
    if offset == 0 or offset >= len(content):
        return min(offset, len(content))
    end = content.find(b"\n", offset - 1)
    return len(content) if end < 0 else end + 1


def _count_lines(content: mmap.mmap, stop: int) -> int:
    return sum(content[start : min(start + COUNTED, stop)].count(b"\n") for start in range(0, stop, COUNTED))


def _read_line(line: bytes, wanted: Wanted) -> tuple[Any] | str | None:
    """The text of a record, or why there is none; None for a line that is empty."""
    if not line.strip():
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"no JSON: {error}"
    return _take(record, wanted)


def _take(record: Any, wanted: Wanted) -> tuple[Any] | str:
    """What is wanted of a record, or why there is none."""
    for number, name in enumerate(wanted.field):
        if not isinstance(record, dict) or name not in record:
            return f"no field {'.'.join(wanted.field[: number + 1])}"
        record = record[name]
    found = wanted.take(record)
    return f"field {'.'.join(wanted.field)} {found}" if isinstance(found, str) else found


def _read_packed(unpack: Callable[[IO[bytes]], Iterator[bytes]], place: Place, wanted: Wanted) -> Found:
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if unpack is _unpack_zst:
        errors += (_load("zstandard").ZstdError,)
    try:
        with place.path.open("rb") as file:
            for number, line in enumerate(_split_lines(unpack(file)), start=1):
                found = _read_line(line, wanted)
                if isinstance(found, str):
                    yield Bad(number, found)
                elif found is not None:
                    yield found[0]
    except errors as error:
        raise ValueError(f"{place.path} cannot be unpacked: {error}") from error


def _unpack_gz(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(file) as content:
        while chunk := content.read(CHUNK):
            yield chunk


def _unpack_zst(file: IO[bytes]) -> Iterator[bytes]:
    """Frame after frame."""
    zst, frame = _load("zstandard"), None
    while chunk := file.read(CHUNK):
        while chunk:
            frame = frame or zst.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("it ends in the middle of a frame")


def _split_lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    begun: list[bytes] = []  # of the line that goes on
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        begun.append(first)
        if rest:
            yield b"".join(begun)
            yield from rest[:-1]
            begun = [rest[-1]]
    if any(begun):
        yield b"".join(begun)


def _read_parquet(place: Place, wanted: Wanted) -> Found:
    arrow, parquet = _load("pyarrow"), _load("pyarrow.parquet")
    try:
        # By default a column of a row group is read as a whole, and a file may be one row group.
        with parquet.ParquetFile(place.path, buffer_size=CHUNK, pre_buffer=False) as file:
            rows = 0
            for number in range(file.metadata.num_row_groups):
                about = file.metadata.row_group(number)
                column = about.column(0)
                begin = min(column.data_page_offset, column.dictionary_page_offset or column.data_page_offset)
                if place.start <= begin < place.stop:
                    batches = file.iter_batches(BATCH, row_groups=[number], columns=[".".join(wanted.field)])
                    yield from _read_batches(batches, wanted, rows)
                rows += about.num_rows
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{place.path} is no Parquet file: {error}") from error


def _read_arrow(place: Place, wanted: Wanted) -> Found:
    arrow, ipc = _load("pyarrow"), _load("pyarrow.ipc")
    try:
        with arrow.memory_map(str(place.path)) as source, ipc.open_stream(source) as batches:
            yield from _read_batches(batches, wanted, 0)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{place.path} is no stream of Arrow's: {error}") from error


def _read_batches(batches: Any, wanted: Wanted, row: int) -> Found:
    """The rows of ``batches``, of which the first is ``row``."""
    for batch in batches:
        name = wanted.field[0]
        column = batch.column(name) if name in batch.schema.names else None
        for start in range(0, batch.num_rows, BATCH):
            rows = min(BATCH, batch.num_rows - start)
            for value in [None] * rows if column is None else column.slice(start, rows).to_pylist():
                row += 1
                found = _take({} if column is None else {name: value}, wanted)
                yield Bad(row, found) if isinstance(found, str) else found[0]


def _load(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise ValueError(
            f"{name} is not installed, and reads files of this kind: pip install 'shoestring[data]'"
        ) from None


READERS: dict[str, Callable[[Place, Wanted], Found]] = {
    **dict.fromkeys(LINES, _read_lines),
    ".gz": partial(_read_packed, _unpack_gz),
    ".zst": partial(_read_packed, _unpack_zst),
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
