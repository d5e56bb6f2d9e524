"""Checkpoints on disk: what is written is read, in any cut; what is not as written is said, and nothing is executed."""

import json
import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from training.checkpoint import folders, manifest
from training.checkpoint.files import verify
from training.checkpoint.manifest import BLOCK, DamagedError, Manifest
from training.checkpoint.part import commit, write_part
from training.checkpoint.plan import Reader, load
from training.checkpoint.staging import Staging
from training.chunk import Chunk

WHOLE = {
    "master/weight": torch.arange(48, dtype=torch.float32).view(6, 8),
    "m/weight": torch.arange(48).view(6, 8).bfloat16(),
    "v/stack": torch.arange(120, dtype=torch.float64).view(4, 5, 6),
    "places/block": torch.tensor([3, 1, 0, 2]),
    "buffer/scale": torch.tensor(2.5),
    "rng/0": torch.arange(7, dtype=torch.uint8),
}


FACTS = {
    **{"step": 10, "tokens": 2560, "updates": 10, "since_move": 0, "skipped": 0, "seconds": 1.5},
    "topology": {"pp": 1, "dp": 2, "cp": 1, "tp": 1, "ep": 1},
    "config": {"model": {}, "precision": "fp32", "parallel": {"engine": "native"}},
}


def cut(name: str, *slices: slice) -> Chunk:
    """A rectangle of one of them."""
    whole = WHOLE[name]
    return Chunk(name, tuple(whole.shape), tuple(s.start for s in slices), whole[slices])


RANKS = [
    [
        cut("master/weight", slice(0, 4), slice(0, 3)),
        cut("m/weight", slice(0, 1), slice(0, 8)),
        cut("v/stack", slice(0, 2), slice(0, 5), slice(0, 6)),
        cut("v/stack", slice(2, 3), slice(0, 2), slice(0, 6)),
        Chunk("places/block", (4,), (0,), WHOLE["places/block"]),
        Chunk("buffer/scale", (), (), WHOLE["buffer/scale"]),
        Chunk("rng/0", (7,), (0,), WHOLE["rng/0"]),
    ],
    [
        cut("master/weight", slice(0, 4), slice(3, 8)),
        cut("master/weight", slice(4, 6), slice(0, 8)),
        cut("m/weight", slice(1, 6), slice(0, 8)),
        cut("v/stack", slice(2, 3), slice(2, 5), slice(0, 6)),
        cut("v/stack", slice(3, 4), slice(0, 5), slice(0, 6)),
    ],
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""
    folder = tmp_path / "checkpoints" / "00000010"
    folder.mkdir(parents=True)
    for rank, chunks in enumerate(RANKS):
        write_part(folder, rank, chunks, FACTS if not rank else {})
    assert not folders.find(folder.parent)
    commit(folder, 2)
    return folder


def empty(chunks: list[Chunk], dtype: torch.dtype | None = None) -> list[Chunk]:
    return [chunk._replace(tensor=torch.full_like(chunk.tensor, 77, dtype=dtype)) for chunk in chunks]


@pytest.mark.parametrize(
    "wanted",
    [
        [Chunk(name, tuple(whole.shape), (0,) * whole.dim(), whole) for name, whole in WHOLE.items()],
        [cut("master/weight", slice(1, 5), slice(2, 4)), cut("master/weight", slice(0, 1), slice(7, 8))],
        [cut("v/stack", slice(n, n + 1), slice(1, 4), slice(2, 5)) for n in range(4)],
        [cut("m/weight", slice(3, 3), slice(0, 8))],
        RANKS[1],
    ],
)
def test_any_rectangles_are_read_back(saved: Path, wanted: list[Chunk]) -> None:
    found = empty(wanted)
    load(saved, folders.read_manifest(saved), found)
    for chunk, expected in zip(found, wanted, strict=True):
        assert torch.equal(chunk.tensor, expected.tensor), chunk.name


def test_values_take_the_dtype_that_they_are_wanted_in(saved: Path) -> None:
    (found,) = empty([cut("m/weight", slice(0, 6), slice(0, 8))], torch.float64)
    load(saved, folders.read_manifest(saved), [found])
    assert torch.equal(found.tensor, WHOLE["m/weight"].double())


def test_files_are_safetensors(saved: Path) -> None:
    tensors = load_file(saved / "00001.safetensors")
    assert torch.equal(tensors["master/weight@0,3"], WHOLE["master/weight"][:4, 3:])
    assert torch.equal(load_file(saved / "00000.safetensors")["places/block"], WHOLE["places/block"])


def test_other_programs_read_it_by_torchs_own_loader(saved: Path) -> None:
    state = {name: torch.zeros_like(whole) for name, whole in WHOLE.items() if whole.dim()}
    with pytest.warns(UserWarning, match="single process"):
        dcp.load(state, storage_reader=Reader(saved), no_dist=True)
    assert all(torch.equal(tensor, WHOLE[name]) for name, tensor in state.items())


def test_a_part_of_a_large_tensor_is_read_by_blocks(tmp_path: Path) -> None:
    """What lies outside of the blocks that hold the part may be anything."""
    rows = 3 * BLOCK // 1024 + 5
    whole = torch.arange(rows * 256, dtype=torch.int32).view(torch.float32).view(rows, 256)
    write_part(tmp_path, 0, [Chunk("a", (rows, 256), (0, 0), whole)], FACTS)
    commit(tmp_path, 1)
    found = folders.read_manifest(tmp_path)
    (piece,) = found.tensors["a"].pieces
    assert len(piece.sha256) == 4
    damage(tmp_path / piece.file, piece.at + 2 * BLOCK + 7)
    first = BLOCK // 1024 - 3
    wanted = Chunk("a", (rows, 256), (first, 8), torch.zeros(7, 100))
    load(tmp_path, found, [wanted])
    assert torch.equal(wanted.tensor.view(torch.int32), whole.view(torch.int32)[first : first + 7, 8:108])
    with pytest.raises(DamagedError, match=r"00000\.safetensors: a at \[0, 0\] is damaged"):
        load(tmp_path, found, [wanted._replace(offset=(2 * BLOCK // 1024, 0))])


def damage(path: Path, at: int) -> None:
    """Flips a bit."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def lose_tail(saved: Path) -> None:
    os.truncate(saved / "00001.safetensors", (saved / "00001.safetensors").stat().st_size - 8)


def rewrite(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(saved: Path) -> None:
        content = json.loads((saved / "manifest.json").read_text())
        change(content)
        (saved / "manifest.json").write_text(json.dumps(content))

    return apply


def piece(content: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = content["tensors"]["master/weight"]["pieces"][number]
    return found


MISHAPS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (lambda saved: damage(saved / "00001.safetensors", 700), r"00001\.safetensors: .* is damaged"),
    "a tail": (lose_tail, r"00001\.safetensors: .* is cut short: 8 bytes are missing"),
    "a file": (lambda saved: (saved / "00001.safetensors").unlink(), r"00001\.safetensors: .* cannot be read"),
    "a manifest": (lambda saved: (saved / "manifest.json").unlink(), r"manifest\.json cannot be read"),
    "half a manifest": (lambda saved: os.truncate(saved / "manifest.json", 99), "is not the manifest of a checkpoint"),
    "no text": (lambda saved: (saved / "manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "a list": (lambda saved: (saved / "manifest.json").write_text("[1]"), "is not the manifest"),
    "a format": (rewrite(lambda c: c.update(format=2)), "its format is 2, and this program reads 1"),
    "a piece": (rewrite(lambda c: c["tensors"]["m/weight"]["pieces"].pop()), "m/weight has 8 of its 48 values"),
    "a value twice": (rewrite(lambda c: piece(c, 1).update(offset=[0, 2])), "master/weight has values twice"),
    "a key": (rewrite(lambda c: piece(c).pop("at")), "'at' is missing"),
    "a dtype": (rewrite(lambda c: c["tensors"]["m/weight"].update(dtype="object")), "m/weight has dtype object"),
    "outside": (rewrite(lambda c: piece(c).update(offset=[4, 0])), "not inside"),
    "below zero": (rewrite(lambda c: piece(c).update(at=-8)), "must be whole numbers"),
    "no number": (rewrite(lambda c: piece(c).update(shape=["4", 3])), "must be whole numbers"),
    "another folder": (rewrite(lambda c: piece(c).update(file="../../passwd")), "is not the name of a file beside it"),
    "a checksum": (rewrite(lambda c: piece(c).update(sha256=[])), "master/weight has 0 checksums"),
    "a fact": (rewrite(lambda c: c["run"].pop("tokens")), r"manifest\.json: run\.tokens is missing"),
    "no facts": (rewrite(lambda c: c.update(run={})), r"manifest\.json: run\.step is missing"),
    "a fact inside": (rewrite(lambda c: c["run"]["config"].pop("parallel")), r"run\.config\.parallel is missing"),
    "a fact of another kind": (rewrite(lambda c: c["run"].update(updates="3")), r"run\.updates must be a whole number"),
    "a fact below zero": (rewrite(lambda c: c["run"].update(step=-1)), r"run\.step must be .* negative, not -1"),
    "a section that is none": (rewrite(lambda c: c["run"].update(topology=[1])), r"run\.topology must be a section"),
    "a lie": (rewrite(lambda c: piece(c).update(at=8)), "is damaged"),
}


@pytest.mark.parametrize("what", MISHAPS)
def test_what_is_not_as_written_is_said(saved: Path, what: str) -> None:
    mishap, message = MISHAPS[what]
    mishap(saved)
    everything = [Chunk(name, tuple(whole.shape), (0,) * whole.dim(), whole) for name, whole in WHOLE.items()]
    with pytest.raises(DamagedError, match=message):
        load(saved, folders.read_manifest(saved), empty(everything))
    if (saved / "manifest.json").exists() and what in ("a bit", "a tail", "a file", "a lie"):
        assert list(verify(saved, folders.read_manifest(saved)))


class Bomb:
    """What a pickle can be."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(os.environ["BOMB"]),))


def test_nothing_is_executed(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles in every place, under every name that torch or we read."""
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    hostile = pickle.dumps(Bomb())
    for name in (".metadata", "__0_0.distcp", "00000.json", "state.pt"):
        (saved / name).write_bytes(hostile)
    load(saved, folders.read_manifest(saved), empty(RANKS[0]))
    for name in ("00000.safetensors", "manifest.json"):
        shutil.copytree(saved, tmp_path / name)
        (tmp_path / name / name).write_bytes(hostile)
        with pytest.raises(DamagedError):
            load(tmp_path / name, folders.read_manifest(tmp_path / name), empty(RANKS[0]))
    rewrite(lambda c: c["run"].update(note="${oc.env:HOME}", torch="__import__('os').system('touch x')"))(saved)
    assert folders.read_manifest(saved).run["note"] == "${oc.env:HOME}"
    assert not (tmp_path / "went off").exists()


def test_another_models_checkpoint_is_a_mistake(saved: Path) -> None:
    found = folders.read_manifest(saved)
    with pytest.raises(ValueError, match="the checkpoint has no v/weight"):
        load(saved, found, [Chunk("v/weight", (2,), (0,), torch.zeros(2))])
    with pytest.raises(ValueError, match=r"master/weight is \[6, 8\] in the checkpoint, \[6, 9\] in the model"):
        load(saved, found, [Chunk("master/weight", (6, 9), (0, 0), torch.zeros(6, 9))])


def test_ranks_of_several_minds(tmp_path: Path) -> None:
    write_part(tmp_path, 0, [Chunk("a", (4,), (0,), torch.zeros(2))], {})
    write_part(tmp_path, 1, [Chunk("a", (4,), (2,), torch.zeros(2, dtype=torch.float64))], {})
    with pytest.raises(DamagedError, match="a is float64"):
        commit(tmp_path, 2)
    assert not (tmp_path / "manifest.json").exists()


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    (tmp_path / "00003.safetensors").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device, while writing its header.*00003\.safetensors"):
        write_part(tmp_path, 3, [Chunk(f"{kind}/a", (2**17,), (0,), torch.zeros(2**17)) for kind in "mv"], {})
    assert not (tmp_path / "00003.json").exists()


def test_the_tensor_is_named_that_finds_no_room(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 2**18, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large, while writing v/a.*00003\.safetensors"):
            write_part(tmp_path, 3, [Chunk(f"{kind}/a", (2**17,), (0,), torch.zeros(2**17)) for kind in "mvx"], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_old_checkpoints_go(saved: Path) -> None:
    root = saved.parent
    for step in (20, 30, 40, 50):
        shutil.copytree(saved, folders.locate(root, step))
    assert folders.prune(root, last=9) == []
    assert folders.prune(root, last=2, every=20) == [10, 30]
    assert folders.find(root) == [20, 40, 50]
    (root / "00000060").mkdir()
    (root / "00000060" / "00000.safetensors").write_bytes(b"half")
    assert folders.find(root) == [20, 40, 50]
    assert folders.sweep(root) == [root / "00000060"] and not (root / "00000060").exists()
    assert folders.set_aside(root / "00000050").name == "00000050.damaged"
    assert folders.find(root) == [20, 40] and folders.sweep(root) == []


def test_copies_stay_and_their_room_is_taken_once() -> None:
    staging = Staging(torch.device("cpu"))
    sources = [torch.arange(5.0), torch.arange(6).bfloat16(), torch.tensor(3.0)]
    chunks = [Chunk(str(n), tuple(t.shape), (0,) * t.dim(), t) for n, t in enumerate(sources)]
    first = staging.take(chunks)
    kept = [chunk.tensor.clone() for chunk in first]
    for tensor in sources:
        tensor.add_(1)
    assert all(torch.equal(a.tensor, b) for a, b in zip(first, kept, strict=True))
    second = staging.take(chunks)
    assert second[0].tensor.data_ptr() == first[0].tensor.data_ptr()
    assert all(torch.equal(chunk.tensor, tensor) for chunk, tensor in zip(second, sources, strict=True))


def test_a_manifest_is_the_same_text_whoever_wrote_first(saved: Path) -> None:
    found = folders.read_manifest(saved)
    mixed = {
        name: stored.__class__(stored.shape, stored.dtype, stored.pieces[::-1])
        for name, stored in found.tensors.items()
    }
    assert manifest.write(Manifest(dict(reversed(mixed.items())), found.run)) == (saved / "manifest.json").read_text()
