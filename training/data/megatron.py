"""Token files that Megatron's ``preprocess_data.py`` made, read where they are: ``web.bin`` and ``web.idx``.

    web.bin    token 0 | token 1 | ...                                     dtype, one sequence after the other
    web.idx    MMIDIDX, two zeros | 1: 8 bytes | dtype: 1 byte | sequences n: 8 bytes | documents + 1: 8 bytes
               | length of each sequence: n of 4 bytes | where it begins in web.bin, in bytes: n of 8
               | which sequence each document begins with, and n: 8 bytes each         (all little-endian)

Both are mapped into memory, and nothing is made of them. The documents behind ``1 - held_out`` of the tokens are held
out. Megatron ends documents with a token of its own where it is told to (--append-eod).
"""

import os
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.tokenizer import Tokens

MAGIC = b"MMIDIDX\x00\x00"
HEAD = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHECKED = 1 << 22  # tokens looked at at once
WINDOWS, WINDOW = 64, 1 << 12  # of each file, and bytes in one: what its digest is of


class MegatronFile:
    """The tokens of one split: a ``Row``."""

    def __init__(self, folder: Path, content: Tokens, starts: NDArray[np.int64], eos: int) -> None:
        """``starts``: where the documents begin in ``content``."""
        self.folder, self.eos = folder, eos
        self._content, self._starts = content, starts
        self.tokens, self.documents = len(content), len(starts)

    def check(self, vocabulary: int, most: float) -> int:
        """Looks at the tokens in the first ``most`` bytes; how many bytes those are. ValueError for what is none."""
        size = self._content.itemsize
        stop = int(min(self.tokens, most // size))
        for start in range(0, stop, CHECKED):
            part = self._content[start : min(start + CHECKED, stop)]
            if int(part.max()) >= vocabulary or int(part.min()) < 0:
                wrong = next(int(token) for token in part if not 0 <= token < vocabulary)
                raise ValueError(
                    f"data.tokenizer has {vocabulary:,} tokens, and {self.folder} was made with another: it has {wrong}"
                )
        return stop * size

    def starts(self) -> NDArray[np.int64]:
        """See ``Row``."""
        return self._starts

    def read(self, start: int, stop: int) -> tuple[Tokens, NDArray[np.int64]]:
        """See ``Row``."""
        assert 0 <= start <= stop <= self.tokens
        low, high = np.searchsorted(self._starts, (start, stop))
        return self._content[start:stop], self._starts[low:high] - start


def is_megatron(name: str) -> bool:
    """Whether an entry of data.corpus names such a pair of files, by one of the two."""
    path = Path(name).expanduser()
    return path.suffix in (".bin", ".idx") and all(path.with_suffix(suffix).is_file() for suffix in (".bin", ".idx"))


def open_megatron(name: str, held_out: float, eos: int) -> tuple[dict[str, MegatronFile], str]:
    """Both splits, and a digest of the files.

    Raises:
        ValueError: they are not of the format, do not belong together, or hold out nothing or all.
    """
    index = Path(name).expanduser().with_suffix(".idx")
    content, starts = _map(index)
    cut = int(np.searchsorted(starts, int(len(content) * (1 - held_out))))
    if not (cut > 0 or held_out == 1) or cut >= len(starts):
        raise ValueError(
            f"data.held_out={held_out} leaves one split of {index} empty: it has {len(starts)} documents, and "
            "whole ones are held out"
        )
    end = int(starts[cut])
    splits = {
        "train": MegatronFile(index.parent, content[:end], starts[:cut], eos),
        "held_out": MegatronFile(index.parent, content[end:], starts[cut:] - end, eos),
    }
    return splits, _digest(index, held_out)


def _map(index: Path) -> tuple[Tokens, NDArray[np.int64]]:
    """All tokens, and where documents begin among them."""
    with index.open("rb") as file:
        head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise ValueError(f"{index} is no index of Megatron's: it does not begin with MMIDIDX")
    _, version, code, sequences, documents = HEAD.unpack(head)
    if version != 1 or code not in DTYPES:
        raise ValueError(f"{index} has version {version} and dtype {code}; version 1 with integers can be read")
    if index.stat().st_size < HEAD.size + 12 * sequences + 8 * documents or documents < 2:
        raise ValueError(f"{index} is truncated, or has no document")
    raw = _view(index)
    lengths = _take(raw, HEAD.size, sequences, "<i4")
    pointers = _take(raw, HEAD.size + 4 * sequences, sequences, "<i8")
    firsts = _take(raw, HEAD.size + 12 * sequences, documents, "<i8")
    content = index.with_suffix(".bin")
    dtype: np.dtype[Any] = np.dtype(DTYPES[code])
    if int(pointers[-1]) + int(lengths[-1]) * dtype.itemsize != content.stat().st_size or int(firsts[-1]) != sequences:
        raise ValueError(f"{content} has {content.stat().st_size:,} bytes, which is not what {index} says")
    return _view(content).view(dtype), pointers[firsts[:-1]] // dtype.itemsize


def _view(path: Path) -> NDArray[np.uint8]:
    # A plain view: np.memmap's own slices cost microseconds each.
    return np.memmap(path, np.uint8, "r").view(np.ndarray)


def _take(raw: NDArray[np.uint8], start: int, count: int, dtype: str) -> NDArray[Any]:
    """Numbers that need not lie at a multiple of their size."""
    return np.ndarray((count,), dtype, buffer=raw.data, offset=start)


def _digest(index: Path, held_out: float) -> str:
    """Of the sizes and of evenly spread windows of both files: reading them whole would take hours."""
    digest = blake2b(repr(held_out).encode(), digest_size=16)
    for path in (index, index.with_suffix(".bin")):
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(size.to_bytes(8, "little"))
            for number in range(WINDOWS):
                digest.update(os.pread(file.fileno(), WINDOW, number * max(0, size - WINDOW) // (WINDOWS - 1)))
    return digest.hexdigest()
