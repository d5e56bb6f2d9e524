"""Bytes of a checkpoint: pieces written once from end to end, read by blocks, checked against digests.

    00003.safetensors    n: 8 bytes | header: n bytes of JSON | values of every piece, one after the other

A file of ours is one that the safetensors library reads too: a piece that is a whole tensor has its name, another one
its name, @ and its offset. Values are written as they lie in memory, hashed on the way.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from model.shards import view_bytes, write_head
from training.checkpoint.manifest import BLOCK, SIZES, DamagedError, Manifest, Piece, Stored
from training.checkpoint.place import Direct, Place, Upload, create, explain
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


Values = Callable[[Chunk], Tensor]  # those of a chunk whose tensor may have none


def write_file(path: Place, chunks: Sequence[Chunk], values: Values = attrgetter("tensor")) -> list[Written]:
    """Writes ``chunks``, which lie in host memory, and returns when they are there for good.

    What is being written is hashed at the same time. Chunks whose ``values`` are made one after the other, of which two
    are in memory then, may have tensors on the meta device. Raises OSError, naming the file and the tensor that was
    being written.
    """
    ordered = sorted(chunks, key=lambda chunk: -chunk.tensor.element_size())  # every value at a multiple of its size
    head = write_head((_name_key(chunk), chunk.tensor.dtype, chunk.tensor.shape) for chunk in ordered)
    written: list[Written] = []
    opened: list[Direct | Upload] = []
    try:
        with create(path) as file, ThreadPoolExecutor(1, thread_name_prefix="disk") as disk:
            opened.append(file)
            at, writing = file.write(head), disk.submit(int)
            for chunk in ordered:
                content = view_bytes(values(chunk))
                writing.result()
                writing = disk.submit(file.write, content)
                digests = tuple(hashlib.sha256(block).hexdigest() for block in _cut(content))
                piece = Piece(tuple(chunk.offset), tuple(chunk.tensor.shape), path.name, at, digests)
                written.append(Written(chunk.name, tuple(chunk.global_shape), name_dtype(chunk.tensor.dtype), piece))
                at += len(content)
            writing.result()
    except OSError as error:
        reached = opened[0].position if opened else 0
        last = next((each.name for each in reversed(written) if each.piece.at <= reached), "its header")
        raise OSError(error.errno, f"{error.strerror}, while writing {last}", str(path)) from error
    return written


class Blocks(NamedTuple):
    """Some values of a piece, and the rest of the blocks that they lie in, as they were read."""

    where: str  # for a person
    content: memoryview
    digests: tuple[str, ...]  # what its blocks should have
    wanted: slice  # of its bytes
    dtype: torch.dtype

    def check(self, share: int = 1) -> "Blocks":
        """Raises DamagedError, naming file and tensor, where a block is not as written.

        With a ``share`` about one in so many is looked at. Which ones, their digests draw: the same for whoever reads.
        """
        for digest, block in zip(self.digests, _cut(self.content), strict=True):
            if int(digest[:8], 16) % share == 0 and hashlib.sha256(block).hexdigest() != digest:
                raise DamagedError(f"{self.where} is damaged: its checksum is not the manifest's")
        return self

    def values(self) -> Tensor:
        """What was wanted, [values]: a view."""
        wanted = self.content[self.wanted]
        return torch.frombuffer(wanted, dtype=self.dtype) if len(wanted) else torch.empty(0, dtype=self.dtype)


def read_blocks(
    folder: Place, name: str, stored: Stored, piece: Piece, values: range, into: Tensor | None = None
) -> Blocks:
    """Reads ``values`` of a piece, in its own order; into the memory of ``into``, which has room for as many of its
    dtype, where no more than they has to be read.

    Raises DamagedError, naming file and tensor, where some are missing, UnreachableError where nobody can tell.
    """
    size, width = stored.count_bytes(piece), SIZES[stored.dtype]
    first, end = values.start * width, values.stop * width
    start, stop = first // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, size)
    if into is not None and (start, stop) == (first, end):
        content = view_bytes(into)
    else:
        content = memoryview(bytearray(stop - start))
    where = f"{folder / piece.file}: {name} at {list(piece.offset)}"
    try:
        with (folder / piece.file).open("rb") as file:
            file.seek(piece.at + start)
            found = file.readinto(content)
    except OSError as error:
        raise explain(error, where) from error
    if found < len(content):
        raise DamagedError(f"{where} is cut short: {len(content) - found} bytes are missing")
    digests = piece.sha256[start // BLOCK : -(-stop // BLOCK)]
    return Blocks(where, content, digests, slice(first - start, end - start), getattr(torch, stored.dtype))


def verify(folder: Place, manifest: Manifest) -> Iterator[str]:
    """Reads every byte of a checkpoint, a piece at a time; yields what is wrong with it."""
    for name, stored in manifest.tensors.items():
        for piece in stored.pieces:
            try:
                read_blocks(folder, name, stored, piece, range(math.prod(piece.shape))).check()
            except DamagedError as damage:
                yield str(damage)


def _cut(content: memoryview) -> Iterator[memoryview]:
    return (content[start : start + BLOCK] for start in range(0, len(content), BLOCK))


def name_dtype(dtype: torch.dtype) -> str:
    """As a manifest has it."""
    return str(dtype).removeprefix("torch.")


def _name_key(chunk: Chunk) -> str:
    """In a file, which may have several pieces of a tensor."""
    whole = tuple(chunk.tensor.shape) == tuple(chunk.global_shape)
    return chunk.name if whole else f"{chunk.name}@{','.join(map(str, chunk.offset))}"
