"""Which blocks of which files a rank reads to fill its tensors: torch.distributed.checkpoint's plan, on our files.

    load(folder, manifest, chunks)        what this rank holds, filled in place; no rank asks another
    dcp.load(state, storage_reader=Reader(folder))    the same files, for any program that has torch

A rank may hold several rectangles of a tensor, which is more than torch's own planner knows of (it takes a plain tensor
for the whole one), so ``Chunks`` plans for those. Neither loads anything but JSON and numbers: torch's own reader
unpickles its metadata.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, LoadPlanner, ReadItem, StorageReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.futures import Future

from parallel.doing import Doing
from training.checkpoint.files import Blocks, name_dtype, read_blocks
from training.checkpoint.folders import read_manifest
from training.checkpoint.manifest import BLOCK, MANIFEST, Manifest, Piece, Stored
from training.checkpoint.place import Place, parse
from training.chunk import Chunk


def load(folder: Place, manifest: Manifest, chunks: Sequence[Chunk], share: int = 1) -> None:
    """Fills every tensor of ``chunks``, in its own dtype, from the checkpoint in ``folder``; one in ``share`` blocks is
    compared with its checksum.

    Raises ValueError, naming it, for a tensor that the checkpoint has not, or has in another shape; DamagedError where
    its files are not what was written.
    """
    reader, planner = Reader(folder, manifest, share), Chunks(chunks)
    planner.set_up_planner({}, reader.read_metadata())
    reader.read_data(planner.create_local_plan(), planner).wait()


class Chunks(LoadPlanner):
    """Plans for rectangles of named tensors, of which a rank holds as many as it does."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._wanted: dict[str, list[Chunk]] = {}
        for chunk in chunks:
            self._wanted.setdefault(chunk.name, []).append(chunk)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """``metadata`` of what is there; what to fill is known."""
        assert metadata is not None
        self._stored = metadata.state_dict_metadata

    def create_local_plan(self) -> LoadPlan:
        """Raises ValueError for what is not there."""
        missing = sorted(self._wanted.keys() - self._stored.keys())
        if missing:
            raise ValueError(f"the checkpoint has no {', '.join(missing[:5])}: it is another model's")
        items: list[ReadItem] = []
        for name, chunks in self._wanted.items():
            stored = self._stored[name]
            assert isinstance(stored, TensorStorageMetadata)
            if tuple(stored.size) != tuple(chunks[0].global_shape):
                here = list(chunks[0].global_shape)
                raise ValueError(f"{name} is {list(stored.size)} in the checkpoint, {here} in the model")
            items += create_read_items_for_chunk_list(
                name,
                stored,
                [ChunkStorageMetadata(torch.Size(chunk.offset), chunk.tensor.shape) for chunk in chunks],
            )
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: ranks read without each other."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Never: there are tensors only."""
        raise AssertionError(read_item)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The part of a chunk that an item fills."""
        index = read_item.dest_index
        assert index.index is not None
        return _narrow(self._wanted[index.fqn][index.index].tensor, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing: it was filled where it lies."""


class Reader(StorageReader):
    """A checkpoint of ours, as torch.distributed.checkpoint reads one."""

    def __init__(self, folder: Place, manifest: Manifest | None = None, share: int = 1) -> None:
        """Reads the manifest of ``folder`` where none is given. One in ``share`` blocks is compared."""
        self._folder, self._share = folder, share
        self._manifest = manifest or read_manifest(folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it is the path, or the URL, of a folder with a manifest."""
        return (parse(str(checkpoint_id)) / MANIFEST).exists()

    def reset(self, checkpoint_id: Any = None) -> None:
        """From now on another checkpoint, if one is given."""
        if checkpoint_id is not None:
            self.__init__(parse(str(checkpoint_id)))  # type: ignore[misc]

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The manifest, in torch's terms."""
        return Metadata({name: _describe(stored) for name, stored in self._manifest.tensors.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads all items as they lie in the files; while one is read, the one before is checked and copied."""
        parts = [self._locate(item, planner) for item in plan.items]
        with futures.ThreadPoolExecutor(1, thread_name_prefix="check") as checking:
            before: futures.Future[Any] = checking.submit(int)
            for run in join(sorted(parts, key=lambda part: (part.piece.file, part.piece.at, part.rows.start))):
                blocks = self._read(run)
                before.result()
                before = checking.submit(self._accept, run, blocks)
            before.result()
        for part in parts:
            planner.commit_tensor(part.item, part.into)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _locate(self, item: ReadItem, planner: LoadPlanner) -> "Part":
        stored = self._manifest.tensors[item.storage_index.fqn]
        piece = _find(stored, item.storage_index)
        first = item.storage_offsets[0] if piece.shape else 0
        rows = range(first, first + (item.lengths[0] if piece.shape else 1))
        return Part(item, stored, piece, rows, planner.resolve_tensor(item).detach())

    def _read(self, run: list["Part"]) -> Blocks:
        """The rows of a run; right where they are to be, if they are to be there as they are."""
        item, stored, piece, _, into = run[0]
        name, row = item.storage_index.fqn, math.prod(piece.shape[1:])
        rows = span(run)
        values = range(rows.start * row, rows.stop * row)
        same = into.is_contiguous() and into.device.type == "cpu" and name_dtype(into.dtype) == stored.dtype
        direct = into if same and len(run) == 1 and into.numel() == len(values) else None
        with Doing(name):
            return read_blocks(self._folder, name, stored, piece, values, direct)

    def _accept(self, run: list["Part"], blocks: Blocks) -> None:
        values, whole, shape = blocks.check(self._share).values(), span(run), run[0].piece.shape
        if values.data_ptr() == run[0].into.data_ptr():
            return
        found = values.view((len(whole), *shape[1:]) if shape else ())
        for item, _, _, rows, into in run:
            first = rows.start - whole.start
            into.copy_(_narrow(found, (first, *item.storage_offsets[1:]), item.lengths) if shape else found)


class Part(NamedTuple):
    """What an item reads, and where it goes."""

    item: ReadItem
    stored: Stored
    piece: Piece
    rows: range  # along its first dim; one of a piece without dims
    into: Tensor


def span(run: Sequence[Part]) -> range:
    """All rows from the first to the last of a run."""
    return range(run[0].rows.start, max(part.rows.stop for part in run))


def join(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Runs of ``parts``, which come as they lie in the files: those of a piece of which the one behind begins in the
    block that the one before ends in. Each block is read and checked once.
    """
    run: list[Part] = []
    for part in parts:
        row = part.stored.count_bytes(part.piece) // max(1, part.piece.shape[0] if part.piece.shape else 1)
        if run and not (part.piece is run[0].piece and (part.rows.start - span(run).stop) * row < BLOCK):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _describe(stored: Stored) -> TensorStorageMetadata:
    pieces = [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)) for piece in stored.pieces]
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, stored.dtype)), torch.Size(stored.shape), pieces)


def _find(stored: Stored, index: MetadataIndex) -> Piece:
    if index.index is not None:
        return stored.pieces[index.index]
    return next(piece for piece in stored.pieces if piece.offset == tuple(index.offset or ()))


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(offsets, lengths, strict=True))]
