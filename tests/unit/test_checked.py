"""How much of a checkpoint is compared with its checksums on loading: all of it, or about one block in eight."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import make_run

from training.checkpoint import files, folders, manifest
from training.checkpoint.manifest import DamagedError, Manifest, Piece
from training.checkpoint.part import commit, write_part
from training.checkpoint.plan import load
from training.chunk import Chunk
from training.config import SHARE, Check
from training.loop import train
from training.metrics import read

BLOCK = 256  # bytes that share a digest here
BLOCKS = 40  # of the larger piece, the last of which is shorter
WHOLE = {"large": torch.arange(BLOCK * (BLOCKS - 1) // 4 + 8.0), "small": torch.arange(9.0)}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (files, manifest):
        monkeypatch.setattr(module, "BLOCK", BLOCK)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Manifest]:
    """A checkpoint of two tensors, in a piece each."""
    chunks = [Chunk(name, tuple(whole.shape), (0,), whole) for name, whole in WHOLE.items()]
    write_part(tmp_path, 0, chunks, {})
    commit(tmp_path, 1)
    return tmp_path, manifest.parse((tmp_path / "manifest.json").read_text(), "")


@contextmanager
def flipped(path: Path, at: int) -> Iterator[None]:
    """A bit of ``path`` is another one for a while."""
    for last in (False, True):
        with path.open("r+b") as file:
            file.seek(at)
            (byte,) = file.read(1)
            file.seek(at)
            file.write(bytes([byte ^ 4]))
        if not last:
            yield


def is_noticed(folder: Path, found: Manifest, name: str, check: Check) -> bool:
    """Whether ``name`` of the checkpoint cannot be loaded."""
    shape = found.tensors[name].shape
    try:
        load(folder, found, [Chunk(name, shape, (0,) * len(shape), torch.zeros(shape))], SHARE[check])
    except DamagedError as damage:
        assert name in str(damage) and "00000.safetensors" in str(damage)
        return True
    return False


def find_noticed(folder: Path, found: Manifest, name: str, check: Check) -> list[int]:
    """The blocks of the only piece of ``name`` in which a flipped bit is noticed."""
    (piece,) = found.tensors[name].pieces
    noticed = []
    for number in range(len(piece.sha256)):
        with flipped(folder / piece.file, piece.at + number * BLOCK + 3 * number % 32):
            if is_noticed(folder, found, name, check):
                noticed.append(number)
    assert not is_noticed(folder, found, name, check)  # all as it was
    return noticed


def test_a_flip_is_found_in_any_block_or_in_those_that_are_drawn(saved: tuple[Path, Manifest]) -> None:
    assert find_noticed(*saved, "large", Check.full) == list(range(BLOCKS))
    assert find_noticed(*saved, "small", Check.full) == [0]
    sampled = find_noticed(*saved, "large", Check.sampled)
    assert 0 < len(sampled) < BLOCKS // 4
    assert find_noticed(*saved, "large", Check.sampled) == sampled  # by every rank, in every attempt


def test_another_checkpoint_draws_other_blocks(tmp_path: Path) -> None:
    drawn = set()
    for number in range(5):
        folder = tmp_path / str(number)
        write_part(folder, 0, [Chunk("large", tuple(WHOLE["large"].shape), (0,), WHOLE["large"] + number)], {})
        commit(folder, 1)
        found = manifest.parse((folder / "manifest.json").read_text(), "")
        drawn.add(tuple(find_noticed(folder, found, "large", Check.sampled)))
    assert len(drawn) > 1


@pytest.mark.parametrize("check", Check)
def test_what_is_missing_is_always_noticed(saved: tuple[Path, Manifest], check: Check) -> None:
    folder, found = saved
    path = folder / "00000.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert is_noticed(folder, found, "small", check)
    path.unlink()
    assert is_noticed(folder, found, "large", check) and is_noticed(folder, found, "small", check)


def find_large(folder: Path) -> tuple[str, Piece]:
    """A tensor of a run's checkpoint that has many blocks."""
    tensors = folders.read_manifest(folder).tensors
    return next((name, s.pieces[0]) for name, s in tensors.items() if len(s.pieces[0].sha256) > 2 * 8)


def test_a_run_looks_at_what_it_is_told_to(text: Path, tmp_path: Path) -> None:
    """A block that is not drawn may be anything: the run that was told to sample goes on with it."""
    config = make_run(text, steps=2)
    config.run.sample.tokens, config.checkpoint.every = 0, 1
    train(config, tmp_path)
    folder = folders.locate(tmp_path / folders.FOLDER, 2)
    name, piece = find_large(folder)
    seen = find_noticed(folder, folders.read_manifest(folder), name, Check.sampled)
    other = next(number for number in range(len(piece.sha256)) if number not in seen)
    for check, wanted in ((Check.sampled, 2), (Check.full, 1)):
        config.checkpoint.check = check
        with flipped(folder / piece.file, piece.at + other * BLOCK):
            train(config, tmp_path)
        assert read(tmp_path / "metrics.jsonl", "resume")[-1]["step"] == wanted
