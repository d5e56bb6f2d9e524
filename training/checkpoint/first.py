"""A run's first checkpoint, made of weights that were published: any layout goes on from it, after no step.

    published tensor  --its rows in our order, float32-->  a piece of master/<parameter>, or of buffer/<name>

One tensor is in memory at a time, as it was published and as it is written. There are no moments: before the first
update they are zero. Masters are what was published; what a model computes with is rounded from them when it loads.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.schema import TrainConfig
from model.huggingface import arrange, open_published
from model.huggingface_names import Piece
from training.checkpoint.part import Place, commit, write_part
from training.checkpoint.weights import Weight, list_weights
from training.chunk import Chunk, find_region

FILE = 2**35  # bytes of values in a file, about


class Coming(NamedTuple):
    """A piece of the checkpoint: its place and, without memory, its tensor; and what it is made of."""

    chunk: Chunk
    piece: Piece | None  # None: of a buffer that was not published, and is zero


def admit(config: TrainConfig, published: Path, folder: Place) -> int:
    """Writes the checkpoint ``folder`` of a run ``config`` from the weights in ``published``. The bytes of its values.

    Raises ValueError as ``model.huggingface.load`` before anything is written, OSError where there is no room.
    """
    weights = list_weights(config.model, config.precision)
    shapes = {name: tuple(weight.like.shape) for name, weight in weights.items()}
    source, pieces = open_published(config.model, shapes, published)
    coming = list(_lay_out(weights, pieces))
    origins = {(chunk.name, chunk.offset): piece for chunk, piece in coming}

    def make(chunk: Chunk) -> Tensor:
        piece = origins[chunk.name, chunk.offset]
        if piece is None:
            return torch.zeros_like(chunk.tensor, device="cpu")
        return arrange(source.read(piece.published), piece.order).to(chunk.tensor.dtype).view(chunk.tensor.shape)

    parts = list(_share_out([chunk for chunk, _ in coming]))
    for number, chunks in enumerate(parts):
        write_part(folder, number, chunks, {} if number else _describe(config, published), make)
    return commit(folder, len(parts))


def _lay_out(weights: Mapping[str, Weight], pieces: list[Piece]) -> Iterator[Coming]:
    """Every piece of every one of ``weights``, in the dtype of masters."""
    rest = weights.keys() - {piece.ours for piece in pieces}
    for name, index, piece in [
        *((piece.ours, piece.region, piece) for piece in pieces),
        *((n, (), None) for n in sorted(rest)),
    ]:
        key, like = weights[name]
        region, dtype = find_region(like.shape, index), torch.promote_types(like.dtype, torch.float32)
        part = torch.empty([len(places) for places in region], dtype=dtype, device="meta")
        yield Coming(Chunk(key, tuple(like.shape), tuple(places.start for places in region), part), piece)


def _share_out(chunks: list[Chunk]) -> Iterator[list[Chunk]]:
    """In their order, for each file some."""
    ends = accumulate(chunk.tensor.nbytes for chunk in chunks)
    for _, some in groupby(zip(ends, chunks, strict=True), key=lambda pair: pair[0] // FILE):
        yield [chunk for _, chunk in some]


def _describe(config: TrainConfig, published: Path) -> dict[str, Any]:
    """The facts of a run that has not begun, as ``training.checkpoint.state`` writes them; no rank has part of it."""
    zeros = ("step", "sequences", "tokens", "skipped", "updates", "since_move")
    return {
        **dict.fromkeys(zeros, 0),
        "seconds": 0.0,
        "published": str(published),
        "topology": dict.fromkeys(("pp", "dp", "cp", "tp", "ep"), 1),
        "layers": [[0, config.model.num_layers]],
        "stages": [[0]],
        "config": asdict(config),
    }
