"""Bytes of a checkpoint on a file system: pieces written once from end to end, read by blocks, checked against digests.

    00003.safetensors    n: 8 bytes | header: n bytes of JSON | values of every piece, one after the other

A file of ours is one that the safetensors library reads too: a piece that is a whole tensor has its name, another one
its name, @ and its offset. Values are written as they lie in memory, hashed on the way.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from model.shards import view_bytes, write_head
from training.checkpoint.manifest import BLOCK, DamagedError, Manifest, Piece, Stored
from training.chunk import Chunk


class Written(NamedTuple):
    """A piece, and what it is a piece of."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    piece: Piece


def name_file(rank: int) -> str:
    """What the file of a rank is called."""
    return f"{rank:05}.safetensors"


def write_file(path: Path, chunks: Sequence[Chunk]) -> list[Written]:
    """Writes ``chunks``, which lie in host memory, and returns when they are on disk.

    Raises OSError, naming the file and the tensor that was being written.
    """
    ordered = sorted(chunks, key=lambda chunk: -chunk.tensor.element_size())  # every value at a multiple of its size
    head = write_head((_name_key(chunk), chunk.tensor.dtype, chunk.tensor.shape) for chunk in ordered)
    written: list[Written] = []
    try:
        with path.open("wb") as file:
            at = file.write(head)
            for chunk in ordered:
                content = view_bytes(chunk.tensor)
                blocks = [content[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
                digests = tuple(hashlib.sha256(block).hexdigest() for block in blocks)
                piece = Piece(tuple(chunk.offset), tuple(chunk.tensor.shape), path.name, at, digests)
                written.append(Written(chunk.name, tuple(chunk.global_shape), name_dtype(chunk.tensor.dtype), piece))
                at += file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        last = written[-1].name if written else "its header"
        raise OSError(error.errno, f"{error.strerror}, while writing {last}", str(path)) from error
    return written


def read_rows(folder: Path, name: str, stored: Stored, piece: Piece, rows: range) -> Tensor:
    """Rows of a piece along its first dim, [len(rows), ...]; all of one without dims.

    Reads the blocks that they lie in. Raises DamagedError, naming file and tensor, where they are not as written.
    """
    size = stored.count_bytes(piece)
    row = size // piece.shape[0] if piece.shape else size
    first, end = rows.start * row, rows.stop * row
    start, stop = first // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, size)
    content = bytearray(stop - start)
    where = f"{folder / piece.file}: {name} at {list(piece.offset)}"
    try:
        with (folder / piece.file).open("rb") as file:
            file.seek(piece.at + start)
            found = file.readinto(content)
    except OSError as error:
        raise DamagedError(f"{where} cannot be read: {error}") from error
    if found < len(content):
        raise DamagedError(f"{where} is cut short: {len(content) - found} bytes are missing")
    for number, at in enumerate(range(0, len(content), BLOCK), start=start // BLOCK):
        if hashlib.sha256(memoryview(content)[at : at + BLOCK]).hexdigest() != piece.sha256[number]:
            raise DamagedError(f"{where} is damaged: its checksum is not the manifest's")
    values = memoryview(content)[first - start : end - start]
    shape = (len(rows), *piece.shape[1:]) if piece.shape else ()
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return torch.frombuffer(values, dtype=dtype).view(shape) if len(values) else torch.empty(shape, dtype=dtype)


def verify(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Reads every byte of a checkpoint, a piece at a time; yields what is wrong with it."""
    for name, stored in manifest.tensors.items():
        for piece in stored.pieces:
            try:
                read_rows(folder, name, stored, piece, range(piece.shape[0] if piece.shape else 1))
            except DamagedError as damage:
                yield str(damage)


def replace_text(path: Path, text: str) -> None:
    """``path`` has ``text``, and does so after a crash too; before, it has all of what it had."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """What was made or renamed in ``folder`` is on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def name_dtype(dtype: torch.dtype) -> str:
    """As a manifest has it."""
    return str(dtype).removeprefix("torch.")


def _name_key(chunk: Chunk) -> str:
    """In a file, which may have several pieces of a tensor."""
    whole = tuple(chunk.tensor.shape) == tuple(chunk.global_shape)
    return chunk.name if whole else f"{chunk.name}@{','.join(map(str, chunk.offset))}"
