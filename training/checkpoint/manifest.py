"""What a checkpoint is, as one JSON file: every tensor's name, global shape and dtype, and where its pieces lie.

    {"format": 1,
     "tensors": {"master/head.weight": {"shape": [264, 64], "dtype": "float32", "pieces": [
         {"offset": [0, 0], "shape": [132, 64], "file": "00000.safetensors", "at": 4096, "sha256": ["9f8a..."]}, ...]}},
     "run": {"step": 100, "sequences": 800, ...}}

``offset`` and ``shape`` place a piece in the whole tensor, so that any layout finds what it needs. ``at`` is the byte
of the file where its values begin, row after row. ``sha256`` has one digest for every ``BLOCK`` bytes of them, the last
block being shorter: whoever reads a part of a piece reads and checks the blocks that hold it, and no others.

Each rank writes a part of that shape with its own pieces, ``00003.json``; a checkpoint is there once all parts are one
``manifest.json``. Standard library only: docs/checkpoint-format.md is the page to write another reader from.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

FORMAT = 1
BLOCK = 2**24  # bytes that share a digest
MANIFEST = "manifest.json"
SIZES = {  # bytes of an element
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "uint8": 1,
}


class DamagedError(ValueError):
    """A checkpoint is not what was written: something is missing, cut short or changed."""


class Piece(NamedTuple):
    """A rectangle of a tensor, in a file."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    at: int
    sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]

    def count_bytes(self, piece: Piece) -> int:
        """Of a piece's values."""
        return math.prod(piece.shape) * SIZES[self.dtype]


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of a checkpoint but the values."""

    tensors: Mapping[str, Stored]
    run: Mapping[str, Any] = field(default_factory=dict)

    def count_bytes(self) -> int:
        """Of all values."""
        return sum(stored.count_bytes(piece) for stored in self.tensors.values() for piece in stored.pieces)

    def files(self) -> dict[str, int]:
        """Every file, and the bytes it has at least."""
        ends: dict[str, int] = {}
        for stored in self.tensors.values():
            for piece in stored.pieces:
                ends[piece.file] = max(ends.get(piece.file, 0), piece.at + stored.count_bytes(piece))
        return ends

    def check(self, where: str) -> None:
        """Raises DamagedError, naming the tensor, where pieces do not cover it, each value once."""
        for name, stored in self.tensors.items():
            held = sum(math.prod(piece.shape) for piece in stored.pieces)
            if held != math.prod(stored.shape):
                raise DamagedError(f"{where}: {name} has {held} of its {math.prod(stored.shape)} values")
            if _overlap(stored.pieces):
                raise DamagedError(f"{where}: {name} has values twice")


def write(manifest: Manifest) -> str:
    """As text."""
    tensors = {
        name: {
            "shape": list(stored.shape),
            "dtype": stored.dtype,
            "pieces": [
                piece._asdict()
                for piece in sorted(stored.pieces)  # the same bytes, whoever was first
            ],
        }
        for name, stored in sorted(manifest.tensors.items())
    }
    return json.dumps({"format": FORMAT, "run": dict(manifest.run), "tensors": tensors}, separators=(",", ":")) + "\n"


def parse(text: str, where: str) -> Manifest:
    """What ``write`` wrote. Raises DamagedError, which says ``where`` and what is wrong, for anything else."""
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, and this program reads {FORMAT}")
        tensors = {str(name): _parse_stored(name, stored) for name, stored in content["tensors"].items()}
        return Manifest(tensors, dict(content["run"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DamagedError(f"{where} is not the manifest of a checkpoint: {reason}") from error


def join(parts: Iterable[Manifest]) -> Manifest:
    """The pieces of all ranks as one. Raises DamagedError where they are of several minds about a tensor."""
    tensors: dict[str, Stored] = {}
    run: dict[str, Any] = {}
    for part in parts:
        run |= part.run
        for name, stored in part.tensors.items():
            known = tensors.setdefault(name, Stored(stored.shape, stored.dtype, ()))
            if (known.shape, known.dtype) != (stored.shape, stored.dtype):
                raise DamagedError(f"{name} is {stored.dtype} {stored.shape} on one rank, {known.dtype} {known.shape}")
            tensors[name] = Stored(known.shape, known.dtype, known.pieces + stored.pieces)
    return Manifest(tensors, run)


def _overlap(pieces: Iterable[Piece]) -> bool:
    """Whether two of them have a value in common: along the first dim, few are side by side."""
    beside: list[Piece] = []
    for piece in sorted(piece for piece in pieces if 0 not in piece.shape):
        beside = [other for other in beside if not piece.shape or _end(other) > piece.offset[0]]
        for other in beside:
            spans = zip(piece.offset, piece.shape, other.offset, other.shape, strict=True)
            if all(max(a, b) < min(a + m, b + n) for a, m, b, n in spans):
                return True
        beside.append(piece)
    return False


def _end(piece: Piece) -> int:
    return piece.offset[0] + piece.shape[0]


def _parse_stored(name: str, content: Mapping[str, Any]) -> Stored:
    shape, dtype = _whole(content["shape"]), content["dtype"]
    if dtype not in SIZES:
        raise ValueError(f"{name} has dtype {dtype}; known are {', '.join(SIZES)}")
    stored = Stored(shape, dtype, tuple(_parse_piece(name, shape, piece) for piece in content["pieces"]))
    for piece in stored.pieces:
        if len(piece.sha256) != -(-stored.count_bytes(piece) // BLOCK):
            raise ValueError(f"{name} has {len(piece.sha256)} checksums in {piece.file}")
    return stored


def _parse_piece(name: str, whole: tuple[int, ...], content: Mapping[str, Any]) -> Piece:
    offset, shape, (at,) = _whole(content["offset"]), _whole(content["shape"]), _whole([content["at"]])
    inside = len(offset) == len(shape) == len(whole) and all(
        start + size <= limit for start, size, limit in zip(offset, shape, whole, strict=True)
    )
    if not inside:
        raise ValueError(f"{name} has a piece {list(shape)} at {list(offset)}, which is not inside {list(whole)}")
    file = content["file"]
    if not isinstance(file, str) or not file or "/" in file or "\\" in file or file.startswith("."):
        raise ValueError(f"{name}: {file!r} is not the name of a file beside it")
    return Piece(offset, shape, file, at, tuple(map(str, content["sha256"])))


def _whole(values: Iterable[Any]) -> tuple[int, ...]:
    """Whole numbers, none of them negative."""
    found = tuple(values)
    if any(type(value) is not int or value < 0 for value in found):
        raise ValueError(f"{list(found)} must be whole numbers")
    return found
