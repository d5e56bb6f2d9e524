"""Hugging Face in and out: weights and configuration as each family published them.

    load     check config.json, then the files' headers | one tensor after another
    export   check the source against its configuration | config.json | one tensor after another | the index, last

Peak memory beyond the model is one published tensor. What is which is in model/huggingface_names.py; how tensors lie in
files, in model/shards.py; ``config.json``, in model/huggingface_config.py. Shapes: those of the tensors.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from model.build import Transformer, allocate
from model.config import ModelConfig
from model.huggingface_config import FILE, QUANTISED, compare, describe
from model.huggingface_fp8 import QuantisedShards, quantise_pending
from model.huggingface_names import Order, Piece, cut, is_biased, repeat
from model.shards import SHARD, Index, Pending, Shards, open_shards, write_shards

LEFTOVERS = ("rotary_emb.inv_freq",)  # endings of names that older files have and that a model computes itself


class Source(Protocol):
    """Where an export takes our tensors from: a model in memory, or files (``Shards``)."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: Index = ()) -> Tensor: ...


class Resident:
    """The parameters and buffers of a model in memory, each once."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, index: Index = ()) -> Tensor:
        return self.tensors[name].detach()[index]


@torch.no_grad()
def load(model: Transformer, folder: Path) -> None:
    """Sets every weight of ``model`` from ``folder``, rounded to the dtypes of ``model``.

    A model without MTP takes the rest of one that has it. Raises ValueError naming file and key or tensor, before
    anything is changed, where the configuration differs or a tensor is missing, left over, of another shape or cannot
    be read."""
    into = Resident(model)
    source, pieces = open_published(model.config, into.shapes(), folder)
    for piece in pieces:
        part = into.read(piece.ours, piece.region)
        part.copy_(arrange(source.read(piece.published), piece.order).view(part.shape))
    clear_biases(model)


def clear_biases(model: Transformer) -> None:
    """Those of routers whose family publishes none are zero."""
    if not is_biased(model.config):
        for router in model.routers():
            router.bias.zero_()


def open_published(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> tuple[Shards, list[Piece]]:
    """The tensors of ``folder``, and which of them are what of ours; ``shapes`` are those of all of ours by name.

    The biases of softmax routers, which are zero, are not published. Raises as ``load``."""
    published = compare(config, folder)
    source = open_shards(folder, QuantisedShards)
    pieces = cut(config, shapes, published.interleaved)
    _check_pieces(source, pieces, shapes, folder)
    _check_rest(source, pieces, config, published.config.mtp.depth)
    return source, pieces


def export(
    source: Source,
    config: ModelConfig,
    folder: Path,
    shard: int = SHARD,
    eos: int | None = None,
    fp8: bool = False,
) -> None:
    """Writes the model ``config`` with the tensors of ``source`` to ``folder``, in files of ``shard`` bytes.

    Dtypes are kept: in a BF16 model the routers stay float32. ``eos``: the token that ends a text, for whoever
    generates. With ``fp8`` projections are written in 8 bits: model/huggingface_fp8.py. Raises ValueError where
    ``folder`` is not empty, the layout has no place for a choice of ``config``, or ``source`` does not fit it."""
    refuse_full(folder)
    values = describe(config, str(source.dtype("embedding.weight")).removeprefix("torch."), eos)
    tensors = publish(source, config)
    if fp8:
        values, tensors = values | {"quantization_config": QUANTISED}, quantise_pending(tensors)
    write_folder(folder, values, tensors, shard)


def refuse_full(folder: Path) -> None:
    """Raises ValueError where ``folder`` is there and not empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"to={folder} must be a folder that does not exist yet, or is empty")


def write_folder(folder: Path, values: Mapping[str, Any], tensors: Mapping[str, Pending], shard: int) -> None:
    """A published model: config.json, and the tensors in files of ``shard`` bytes; the index comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(values, indent=2) + "\n")
    write_shards(folder, tensors, shard)


def publish(source: Source, config: ModelConfig) -> dict[str, Pending]:
    """Every tensor of the published layout, still to be made. ValueError where ``source`` does not fit ``config``."""
    shapes = source.shapes()
    expected = Resident(allocate(config, torch.float32, "meta")).shapes()
    if wrong := [name for name in [*expected, *shapes] if expected.get(name) != shapes.get(name)]:
        name = wrong[0]
        raise ValueError(
            f"{name}: the model {config.name} has {expected.get(name)}, its weights have {shapes.get(name)}"
        )
    if not is_biased(config):
        _check_unbiased(source, shapes)
    tensors = {}
    for piece in cut(config, shapes):
        shape = piece.shape(shapes[piece.ours])
        tensors[piece.published] = Pending(source.dtype(piece.ours), shape, partial(_make, source, piece, shape))
    return tensors | {copy: tensors[original] for copy, original in repeat(config).items()}


def arrange(tensor: Tensor, order: Order | None) -> Tensor:
    """``tensor`` with its rows or columns in ``order``."""
    return tensor if order is None else tensor.index_select(order.dim, order.places.to(tensor.device))


def _make(source: Source, piece: Piece, shape: tuple[int, ...]) -> Tensor:
    part = source.read(piece.ours, piece.region).reshape(shape)
    return arrange(part, piece.order.invert() if piece.order else None)


def _check_pieces(source: Shards, pieces: list[Piece], shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Raises ValueError for a tensor that is missing, of another shape or of a dtype that cannot be read."""
    for piece in pieces:
        entry = source.entries.get(piece.published)
        if entry is None:
            raise ValueError(f"{folder}: {piece.published} is missing")
        source.dtype(piece.published)
        shape = piece.shape(shapes[piece.ours])
        if entry.shape != shape:
            raise ValueError(
                f"{entry.file}: {piece.published} has shape {list(entry.shape)}; the model wants {list(shape)}"
            )


def _check_rest(source: Shards, pieces: list[Piece], config: ModelConfig, depth: int) -> None:
    """Raises ValueError for a tensor that the model has no place for, or a copy that is none.

    ``depth``: of MTP in the folder."""
    copies = repeat(config)
    if config.tied:
        copies |= {"lm_head.weight": "model.embed_tokens.weight"}
    known = {piece.published for piece in pieces} | copies.keys()
    first = config.num_layers + config.mtp.depth
    left_out = tuple(f"model.layers.{layer}." for layer in range(first, config.num_layers + depth))
    for name, entry in source.entries.items():
        # transformers writes an empty shared expert where there is none.
        needless = 0 in entry.shape or name.endswith(LEFTOVERS) or name.startswith(left_out)
        if name not in known and not needless:
            raise ValueError(f"{entry.file}: {name} has no place in the model")
    for copy, original in copies.items():
        if copy in source.entries and not _equal(source, copy, original):
            raise ValueError(f"{source.entries[copy].file}: {copy} differs from {original}; the model here shares them")


def _equal(source: Shards, first: str, second: str) -> bool:
    if source.entries[first].shape != source.entries[second].shape:
        return False
    return all(torch.equal(source.read(first, part), source.read(second, part)) for part in source.parts(first))


def _check_unbiased(source: Source, shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name in shapes:
        if name.endswith("router.bias") and source.read(name).any():
            raise ValueError(
                f"{name} cannot be published with model.moe.score=softmax: its layout has no selection bias"
            )
