"""Token files: how tokens lie on disk, and how they are read back as one long row.

    <split>-00000.tokens   |token 0|token 1|...|token n-1|0..7 zero bytes|start 0|...|start d-1|
                            little-endian uint16 or uint32                little-endian uint64

``start`` is the position in this file of a document's first token, for the documents that begin in it. A split is its
shards end to end; documents and sequences may run on from one shard into the next. Sizes, counts and checksums
(CRC-32 of the whole file) are in the folder's index.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from training.data.tokenizer import Tokens

UNCOUNTED = 1 << 31  # the bit of a token that is no label


class Shard(NamedTuple):
    """A row of the index."""

    file: str
    tokens: int
    documents: int  # that begin here
    text_bytes: int  # of UTF-8
    replaced: int  # characters U+FFFD: bytes that are not UTF-8, or in the text itself
    crc32: int

    def count_bytes(self, itemsize: int) -> int:
        """The size its file must have."""
        return -(-self.tokens * itemsize // 8) * 8 + self.documents * 8


class ShardWriter:
    """Writes a shard under another name and gives it its own at the end: a file with the right name is whole.

    As a context, it leaves nothing behind where it was not finished.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.path = path
        self.dtype = dtype
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._file = self._partial.open("wb")
        self._tokens = 0
        self._crc = 0
        self._starts: list[NDArray[np.uint64]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def append(self, tokens: Tokens, starts: Sequence[int]) -> None:
        """Adds ``tokens``; documents begin at the positions ``starts`` among them."""
        if len(starts):
            self._starts.append(np.asarray(starts, "<u8") + np.uint64(self._tokens))
        self._write(np.ascontiguousarray(tokens, self.dtype).tobytes())
        self._tokens += len(tokens)

    def finish(self, text_bytes: int, replaced: int) -> Shard:
        """Commits the file."""
        self._write(bytes(-self._file.tell() % 8))
        starts = np.concatenate([np.zeros(0, "<u8"), *self._starts])
        self._write(starts.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self.path)
        return Shard(self.path.name, self._tokens, len(starts), text_bytes, replaced, self._crc)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._crc = zlib.crc32(content, self._crc)


def split_flags(tokens: Tokens) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Ids, and which of them count as labels: ids of 4 bytes may say in their highest bit that they do not."""
    if tokens.dtype.itemsize < 4:
        return tokens.astype(np.int64), np.ones(len(tokens), np.bool_)
    wide = tokens.astype(np.int64)
    return wide & (UNCOUNTED - 1), wide < UNCOUNTED


class Row(Protocol):
    """The tokens of one split, one document after the other.

    Attributes:
        folder: where they lie.
        tokens: how many there are.
        documents: how many there are.
        eos: the token that ends each document.
    """

    folder: Path
    tokens: int
    documents: int
    eos: int

    def read(self, start: int, stop: int) -> tuple[Tokens, NDArray[np.int64]]:
        """Tokens ``start`` to ``stop`` (at most ``self.tokens``), [stop - start], and which of them, counted from
        ``start``, are the first of a document, ascending."""
        ...

    def starts(self) -> NDArray[np.int64]:
        """Where documents begin, [documents], ascending."""
        ...


class TokenFile:
    """A ``Row`` of shards, memory-mapped as they are touched."""

    def __init__(self, folder: Path, shards: Sequence[Shard], dtype: np.dtype[Any], eos: int) -> None:
        self.folder = folder
        self.shards = tuple(shards)
        self.dtype = dtype
        self.eos = eos
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)
        self.tokens = sum(shard.tokens for shard in shards)
        self.documents = sum(shard.documents for shard in shards)
        self._maps: dict[int, tuple[Tokens, NDArray[np.uint64]]] = {}

    def read(self, start: int, stop: int) -> tuple[Tokens, NDArray[np.int64]]:
        """See ``Row``."""
        assert 0 <= start <= stop <= self.tokens
        number = int(np.searchsorted(self._ends, start, side="right"))
        rows, firsts = [np.zeros(0, self.dtype)], [np.zeros(0, np.int64)]
        position = start
        while position < stop:
            tokens, starts = self._map(number)
            begin = int(self._ends[number]) - len(tokens)  # of the shard, in the split
            low, high = position - begin, min(stop - begin, len(tokens))
            rows.append(tokens[low:high])
            inside = starts[np.searchsorted(starts, low) : np.searchsorted(starts, high)]
            firsts.append(inside.astype(np.int64) + (begin - start))
            position = begin + high
            number += 1
        return np.concatenate(rows), np.concatenate(firsts)

    def starts(self) -> NDArray[np.int64]:
        """See ``Row``."""
        begins = [0, *self._ends.tolist()]
        found = [self._map(number)[1].astype(np.int64) + begins[number] for number in range(len(self.shards))]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def _map(self, number: int) -> tuple[Tokens, NDArray[np.uint64]]:
        if number not in self._maps:
            shard = self.shards[number]
            path = self.folder / shard.file
            content = np.memmap(path, np.uint8, "r") if shard.tokens else np.zeros(0, np.uint8)
            size = shard.tokens * self.dtype.itemsize
            # A plain view: np.memmap's own slices cost microseconds each.
            raw = content.view(np.ndarray)
            tail = raw[len(raw) - 8 * shard.documents :]
            self._maps[number] = (raw[:size].view(self.dtype), tail.view("<u8"))
        return self._maps[number]
