"""The weights in a checkpoint, as a model has them: what an export reads, without a model in memory.

    master/<parameter> float32   --rounded to the parameter's dtype-->   <parameter>     bfloat16, routers float32
    buffer/<name>                                                        <name>          the same

A region of a tensor is made of whatever pieces, of whatever files, it lies in, a block of 16 MiB after the other: its
checksum is compared, and what the region has of it is rounded into place. Beside the region, two blocks are in memory
at any time. The block that was read last is kept: a block that holds many small experts is read once for all of them.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.shards import Index
from training.checkpoint.files import read_blocks
from training.checkpoint.manifest import BLOCK, SIZES, Manifest, Piece, Stored
from training.checkpoint.place import Place
from training.chunk import Chunk, copy_into, find_region
from training.pieces import cut_range

BUFFER = "buffer/"


class Block(NamedTuple):
    """Some neighbouring values of a piece."""

    name: str
    piece: Piece
    number: int
    values: Tensor  # [BLOCK / bytes of a value], the last one of a piece shorter


class Rounded:
    """The source of an export (model/huggingface.py) that a checkpoint is. Shapes are those of the whole model."""

    def __init__(
        self, folder: Place, manifest: Manifest, dtypes: Mapping[str, torch.dtype], kind: str = "master/"
    ) -> None:
        """``dtypes`` of the model's tensors by name; ``kind``: what is taken for the parameters."""
        self._folder, self._dtypes = folder, dtypes
        self._keys = {key.partition("/")[2]: key for key in manifest.tensors if key.startswith((kind, BUFFER))}
        self._tensors = manifest.tensors
        self._spans: tuple[str, npt.NDArray[np.int64]] | None = None
        self._last: Block | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter and buffer in the checkpoint."""
        return {name: self._tensors[key].shape for name, key in self._keys.items()}

    def dtype(self, name: str) -> torch.dtype:
        """That the model has it in."""
        return self._dtypes[name]

    def read(self, name: str, index: Index = ()) -> Tensor:
        """``name[index]``, rounded. Raises DamagedError, naming file and tensor, where a block is not as written."""
        stored = self._tensors[self._keys[name]]
        region = find_region(stored.shape, index)
        into = torch.empty([len(part) for part in region], dtype=self._dtypes[name])
        offset = tuple(part.start for part in region)
        complete = copy_into(Chunk(name, stored.shape, offset, into), self._cut(name, stored, region))
        assert complete, name  # the manifest's pieces cover every tensor
        return into[tuple(0 if isinstance(place, int) else slice(None) for place in index)]

    def _cut(self, name: str, stored: Stored, region: list[range]) -> Iterator[Chunk]:
        """What is read of a tensor for ``region``, and more of the same blocks, a block at a time."""
        size = BLOCK // SIZES[stored.dtype]
        for piece in self._find(name, stored, region):
            first, last = _span(piece, region)
            for number in range(first // size, last // size + 1):
                yield from _place(name, stored, piece, self._read(name, stored, piece, number), number * size)

    def _find(self, name: str, stored: Stored, region: list[range]) -> Iterator[Piece]:
        """The pieces that have something of ``region``."""
        if self._spans is None or self._spans[0] != name:
            self._spans = name, np.array([(piece.offset, piece.shape) for piece in stored.pieces], dtype=np.int64)
        starts, ends = self._spans[1][:, 0], self._spans[1].sum(axis=1)
        common = np.minimum(ends, [part.stop for part in region]) - np.maximum(starts, [part.start for part in region])
        return (stored.pieces[number] for number in np.flatnonzero((common > 0).all(axis=1)))

    def _read(self, name: str, stored: Stored, piece: Piece, number: int) -> Tensor:
        """A block of a piece."""
        last = self._last
        if last is None or (last.name, last.piece, last.number) != (name, piece, number):
            width = SIZES[stored.dtype]
            values = range(number * BLOCK // width, min((number + 1) * BLOCK, stored.count_bytes(piece)) // width)
            found = read_blocks(self._folder, self._keys[name], stored, piece, values).check().values()
            last = self._last = Block(name, piece, number, found)
        return last.values


def _span(piece: Piece, region: list[range]) -> tuple[int, int]:
    """The first and the last value of a piece, in its own order, that are in ``region``."""
    corners = [
        (max(part.start, start) - start, min(part.stop, start + size) - start - 1)
        for part, start, size in zip(region, piece.offset, piece.shape, strict=True)
    ]
    first, last = (int(np.ravel_multi_index(corner, piece.shape)) for corner in zip(*corners, strict=True))
    return first, last


def _place(name: str, stored: Stored, piece: Piece, values: Tensor, start: int) -> Iterator[Chunk]:
    """``values`` of a piece, from the one with the number ``start`` on, as rectangles of the whole tensor."""
    at = 0
    for inside, shape in cut_range(piece.shape, range(start, start + len(values))):
        offset = tuple(map(sum, zip(piece.offset, inside, strict=True)))
        size = math.prod(shape)
        yield Chunk(name, stored.shape, offset, values[at : at + size].view(shape))
        at += size
