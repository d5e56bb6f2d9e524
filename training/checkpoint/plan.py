"""Which blocks of which files a rank reads to fill its tensors: torch.distributed.checkpoint's plan, on our files.

    load(folder, manifest, chunks)        what this rank holds, filled in place; no rank asks another
    dcp.load(state, storage_reader=Reader(folder))    the same files, for any program that has torch

A rank may hold several rectangles of a tensor, which is more than torch's own planner knows of (it takes a plain tensor
for the whole one), so ``Chunks`` plans for those. Neither loads anything but JSON and numbers: torch's own reader
unpickles its metadata.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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

from training.checkpoint.files import read_rows
from training.checkpoint.folders import read_manifest
from training.checkpoint.manifest import MANIFEST, Manifest, Piece, Stored
from training.chunk import Chunk


def load(folder: Path, manifest: Manifest, chunks: Sequence[Chunk]) -> None:
    """Fills every tensor of ``chunks``, in its own dtype, from the checkpoint in ``folder``.

    Raises ValueError, naming it, for a tensor that the checkpoint has not, or has in another shape; DamagedError where
    its files are not what was written.
    """
    reader, planner = Reader(folder, manifest), Chunks(chunks)
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

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        """Reads the manifest of ``folder`` where none is given."""
        self._folder = folder
        self._manifest = manifest or read_manifest(folder)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Whether it is a folder with a manifest."""
        return (Path(checkpoint_id) / MANIFEST).is_file()

    def reset(self, checkpoint_id: Any = None) -> None:
        """From now on another checkpoint, if one is given."""
        if checkpoint_id is not None:
            self.__init__(Path(checkpoint_id))  # type: ignore[misc]

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
        """Reads, checks and copies all items, one after the other: at most one piece is in memory."""
        for item in plan.items:
            name = item.storage_index.fqn
            stored = self._manifest.tensors[name]
            piece = _find(stored, item.storage_index)
            first = item.storage_offsets[0] if piece.shape else 0
            rows = range(first, first + (item.lengths[0] if piece.shape else 1))
            found = read_rows(self._folder, name, stored, piece, rows)
            into = planner.resolve_tensor(item).detach()
            into.copy_(_narrow(found, (0, *item.storage_offsets[1:]), item.lengths) if piece.shape else found)
            planner.commit_tensor(item, into)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _describe(stored: Stored) -> TensorStorageMetadata:
    pieces = [ChunkStorageMetadata(torch.Size(piece.offset), torch.Size(piece.shape)) for piece in stored.pieces]
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, stored.dtype)), torch.Size(stored.shape), pieces)


def _find(stored: Stored, index: MetadataIndex) -> Piece:
    if index.index is not None:
        return stored.pieces[index.index]
    return next(piece for piece in stored.pieces if piece.offset == tuple(index.offset or ()))


def _narrow(tensor: Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    return tensor[tuple(slice(start, start + size) for start, size in zip(offsets, lengths, strict=True))]
