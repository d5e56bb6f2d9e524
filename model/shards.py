"""Tensors in a folder of safetensors files: read a slice at a time, written as a stream.

    model-00001-of-00002.safetensors    n: 8 bytes | header: n bytes of JSON, name -> dtype, shape, offsets | data
    model-00002-of-00002.safetensors
    model.safetensors.index.json        {"metadata": {"total_size": bytes}, "weight_map": {name: file}}

Reading maps a file into memory for the length of one read, so that no more than the slice asked for is ever held.
Writing lays out every file first and then makes, writes and forgets one tensor after another; the index comes last, so
that a folder with an index is complete. (The safetensors library writes a file from a dictionary of all its tensors.)
Shapes: those of the tensors.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # what a small model's only file is called, without an index
SHARD = 5 * 10**9  # bytes a file
PART = 2**25  # bytes of a tensor that is read from end to end and not kept
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}  # and what is written, but not read as a weight:
CODES |= {torch.float8_e4m3fn: "F8_E4M3", torch.int64: "I64", torch.uint8: "U8"}

Index = tuple[int | slice, ...]  # what stands between the brackets of tensor[...]


class Entry(NamedTuple):
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str  # as in the file: "BF16"
    shape: tuple[int, ...]


class Shards:
    """The tensors of some safetensors files by name. Opening reads the headers only."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        """``files``: the file of each name. ValueError where they do not hold exactly these names."""
        self.entries: dict[str, Entry] = {}
        for file in dict.fromkeys(files.values()):
            self.entries |= _list(file)
        for name, file in files.items():
            if name not in self.entries or self.entries[name].file != file:
                raise ValueError(f"{file}: {name} is missing")
        for name, entry in self.entries.items():
            if name not in files:
                raise ValueError(f"{entry.file}: {name} is in the file but not in the index")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        """ValueError for one that is no plain floating point."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.file}: {name} is {entry.dtype}; only {', '.join(DTYPES)} can be read")
        return DTYPES[entry.dtype]

    def read(self, name: str, index: Index = ()) -> Tensor:
        """``name[index]``, and nothing else is read."""
        return read_file(self.entries[name].file, name, index)

    def parts(self, name: str) -> Iterator[Index]:
        """Indices that cut a tensor into runs of rows of about ``PART`` bytes."""
        shape = self.entries[name].shape
        rows = max(1, PART // max(1, torch.Size(shape[1:]).numel() * self.dtype(name).itemsize))
        return ((slice(start, start + rows),) for start in range(0, shape[0], rows))

    def digest(self, name: str) -> str:
        """SHA-256 of the bytes of a tensor."""
        digest = sha256()
        for part in self.parts(name):
            digest.update(view_bytes(self.read(name, part)))
        return digest.hexdigest()


def read_file(path: Path, name: str, index: Index = ()) -> Tensor:
    """``name[index]`` of a file."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
    return tensor


def open_shards(folder: Path, kind: type[Shards] = Shards) -> Shards:
    """The tensors of ``folder``, which has an index or is a single file's. ValueError naming what is wrong."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise ValueError(f"{folder} has neither {INDEX} nor {SINGLE}")
        return kind(dict.fromkeys(_list(folder / SINGLE), folder / SINGLE))
    try:
        names: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        # A file outside the folder is not ours to read.
        strays = [file for file in names.values() if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}") from error
    if strays:
        raise ValueError(f"{index}: {strays[0]} is not the name of a file beside it")
    return kind({name: folder / file for name, file in names.items()})


class Pending(NamedTuple):
    """A tensor still to be made."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """Bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_shards(folder: Path, tensors: Mapping[str, Pending], shard: int = SHARD) -> None:
    """Writes ``tensors`` in their order to files of at most ``shard`` bytes of data, or of one tensor, then the index.

    Holds one tensor at a time. ``folder`` exists and holds no other weights."""
    groups = _group(tensors, shard)
    files: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        _write(folder / file, {name: tensors[name] for name in names})
        files |= dict.fromkeys(names, file)
    size = sum(tensor.size for tensor in tensors.values())
    partial = folder / f"{INDEX}.partial"
    partial.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2) + "\n")
    os.replace(partial, folder / INDEX)


def write_head(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> bytes:
    """What a file begins with that holds tensors of these names, dtypes and shapes, in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's values. Through bytes, because numpy has no bfloat16."""
    flat: memoryview = tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data
    return flat


def _list(file: Path) -> dict[str, Entry]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: Entry(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _group(tensors: Mapping[str, Pending], shard: int) -> list[list[str]]:
    """Names in order, as many to a group as fit ``shard`` bytes."""
    groups: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not groups or tensor.size > room:
            groups.append([])
            room = shard
        groups[-1].append(name)
        room -= tensor.size
    return groups


def _write(path: Path, tensors: Mapping[str, Pending]) -> None:
    with path.open("wb") as file:
        file.write(write_head((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()))
        for name, pending in tensors.items():
            made = pending.make()
            assert made.shape == pending.shape and made.dtype == pending.dtype, name
            file.write(view_bytes(made))
        file.flush()
        os.fsync(file.fileno())
