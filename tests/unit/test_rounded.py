"""What an export reads of a checkpoint: any region, of tensors in any pieces, rounded, each block about once."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.shards import Index
from training.checkpoint import files, manifest, rounded
from training.checkpoint.manifest import DamagedError, Manifest, parse
from training.checkpoint.part import write_part
from training.checkpoint.rounded import Rounded
from training.chunk import Chunk

DRAWN = random.Random(0)  # noqa: S311 (no secret)
BLOCK = 256  # bytes that share a digest here


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, manifest, rounded):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


def split(name: str, whole: Tensor, offset: tuple[int, ...], count: int) -> Iterator[Chunk]:
    """``whole``, which lies at ``offset``, in about ``count`` rectangles."""
    dim = DRAWN.choice([dim for dim, size in enumerate(whole.shape) if size > 1] or [0])
    if count == 1 or whole.numel() == 1:
        yield Chunk(name, (), offset, whole)
        return
    at = DRAWN.randrange(1, whole.shape[dim])
    first, second = whole.split([at, whole.shape[dim] - at], dim)
    behind = tuple(start + at * (number == dim) for number, start in enumerate(offset))
    yield from split(name, first, offset, count // 2)
    yield from split(name, second, behind, count - count // 2)


def save(folder: Path, tensors: dict[str, Tensor], pieces: int) -> Manifest:
    chunks = [
        chunk._replace(global_shape=tuple(whole.shape), tensor=chunk.tensor.contiguous())
        for name, whole in tensors.items()
        for chunk in split(name, whole, (0,) * whole.dim(), pieces)
    ]
    assert len(chunks) > len(tensors) * pieces // 2
    write_part(folder, 0, chunks, {})
    found = parse((folder / "00000.json").read_text(), str(folder))
    found.check(str(folder))
    return found


def draw_index(shape: tuple[int, ...]) -> Index:
    index: list[int | slice] = []
    for size in shape[: DRAWN.randint(0, len(shape))]:
        start, stop = sorted(DRAWN.sample(range(size + 1), 2))
        index.append(DRAWN.choice([start, slice(start, stop), slice(start, None), slice(None)]))
    return tuple(index)


@pytest.mark.parametrize("pieces", [1, 4, 40])
def test_any_region_of_any_pieces(tmp_path: Path, pieces: int) -> None:
    shapes = {"vector": (300,), "matrix": (23, 37), "experts": (6, 2, 9, 11)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    dtypes = {"vector": torch.float32, "matrix": torch.bfloat16, "experts": torch.float64}
    content = {"buffer/vector": tensors["vector"], "m/matrix": tensors["matrix"]}
    content |= {f"master/{name}": tensors[name] for name in ("matrix", "experts")}
    source = Rounded(tmp_path, save(tmp_path, content, pieces), dtypes)
    assert source.shapes() == shapes and {name: source.dtype(name) for name in shapes} == dtypes
    for _ in range(60):
        name = DRAWN.choice(list(shapes))
        index = draw_index(shapes[name])
        found, wanted = source.read(name, index), tensors[name][index].to(dtypes[name])
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), (name, index)


def test_a_block_of_many_experts_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 experts, 8 of them in a block, read as an export does: all gates, then all others."""
    whole = torch.randn(64, 2, 2, 2)
    source = Rounded(tmp_path, save(tmp_path, {"master/experts": whole}, 1), {"experts": torch.float32})
    read: list[int] = []

    def count(*arguments: object) -> Tensor:
        read.append(1)
        return files.read_blocks(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rounded, "read_blocks", count)
    for plane in range(2):
        for expert in range(64):
            assert torch.equal(source.read("experts", (expert, plane)), whole[expert, plane])
    assert len(read) == 2 * whole.nbytes // BLOCK == 16


def test_only_what_is_read_has_to_be_good(tmp_path: Path) -> None:
    whole = torch.randn(64, 8)
    found = save(tmp_path, {"master/a": whole}, 1)
    (piece,) = found.tensors["master/a"].pieces
    with (tmp_path / piece.file).open("r+b") as file:
        file.seek(piece.at + 3 * BLOCK + 1)
        file.write(b"\x55")
    source = Rounded(tmp_path, found, {"a": torch.float32})
    assert torch.equal(source.read("a", (slice(0, 24),)), whole[:24])
    assert torch.equal(source.read("a", (slice(32, None),)), whole[32:])
    with pytest.raises(DamagedError, match=r"00000\.safetensors: master/a at \[0, 0\] is damaged"):
        source.read("a", (25,))
    os.truncate(tmp_path / piece.file, piece.at + BLOCK)
    with pytest.raises(DamagedError, match=r"master/a at \[0, 0\] is cut short"):
        source.read("a")
