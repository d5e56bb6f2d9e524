"""Weights on disk: safetensors shards and a manifest, nothing executable.

    weights/00001.safetensors ...    at most SHARD bytes each (a larger tensor has a shard to itself)
            manifest.json            {"format": 1, "tensors": {name: {shape, dtype, file, sha256}}}

Written under another name and renamed, so that a folder called ``weights`` is complete.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.shards import Shards
from training.gather import name_tensors

FORMAT = 1
SHARD = 5 * 10**9  # bytes
MANIFEST = "manifest.json"


def save(model: nn.Module, folder: Path, shard: int = SHARD) -> None:
    """Writes every parameter and buffer of ``model``, each once, to ``folder``, which must not exist."""
    # Clones, because parameters are slices of one buffer and a file holds each tensor by itself.
    write(((name, tensor.to("cpu", copy=True)) for name, tensor in name_tensors([model]).items()), folder, shard)


def write(tensors: Iterable[tuple[str, Tensor]], folder: Path, shard: int = SHARD) -> None:
    """Writes ``tensors``, which come one at a time and lie in host memory, to ``folder``, which must not exist.

    Holds one file's tensors at once.
    """
    if folder.exists():
        raise FileExistsError(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    entries: dict[str, Any] = {}
    for number, chunk in enumerate(_split(tensors, shard), start=1):
        file = f"{number:05}.safetensors"
        save_file(chunk, str(partial / file))
        entries |= {name: {**_describe(tensor), "file": file} for name, tensor in chunk.items()}
    (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "tensors": entries}, indent=1) + "\n")
    partial.rename(folder)


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """Sets every parameter and buffer of ``model`` from ``folder``, to the bit.

    Raises ValueError naming the file or tensor where something is missing, left over, of another shape or damaged.
    """
    entries = _read_manifest(folder / MANIFEST)
    tensors = name_tensors([model])
    if wrong := sorted(tensors.keys() ^ entries.keys()):
        raise ValueError(f"{folder} does not fit the model: {', '.join(wrong[:5])} on one side only")
    for file in sorted({entry["file"] for entry in entries.values()}):
        path = folder / Path(file).name
        try:
            with safe_open(str(path), framework="pt") as shard:
                for name in (name for name, entry in entries.items() if entry["file"] == file):
                    _take(tensors[name], shard.get_tensor(name), entries[name], f"{path}: {name}")
        except ValueError:
            raise
        except Exception as error:  # safetensors raises a class of its own, derived from Exception
            raise ValueError(f"{path} cannot be read: {error}") from error


def open_saved(folder: Path) -> Shards:
    """The tensors of ``folder``, compared with their checksums, to be read a slice at a time. Raises like ``load``."""
    entries = _read_manifest(folder / MANIFEST)
    shards = Shards({name: folder / Path(entry["file"]).name for name, entry in entries.items()})
    for name, entry in entries.items():
        if shards.digest(name) != entry["sha256"]:
            raise ValueError(f"{shards.entries[name].file}: {name} is damaged: its checksum is not the manifest's")
    return shards


def _split(tensors: Iterable[tuple[str, Tensor]], shard: int) -> Iterator[dict[str, Tensor]]:
    """In their order, in groups of at most ``shard`` bytes or of one tensor."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > shard:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    if group:
        yield group


def _describe(tensor: Tensor) -> dict[str, Any]:
    # Through bytes, because numpy has no bfloat16.
    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(content.data).hexdigest()
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sha256": digest}


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']} is not {FORMAT}")
        return dict(manifest["tensors"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not the manifest of saved weights: {error}") from error


def _take(into: Tensor, tensor: Tensor, entry: dict[str, Any], where: str) -> None:
    found = _describe(tensor)
    wanted = {"shape": list(into.shape), "dtype": str(into.dtype).removeprefix("torch.")}
    for key in ("shape", "dtype"):
        if found[key] != wanted[key]:
            raise ValueError(f"{where} has {key} {found[key]}; the model wants {wanted[key]}")
    if found["sha256"] != entry["sha256"]:
        raise ValueError(f"{where} is damaged: its checksum is not the manifest's")
    into.copy_(tensor)
