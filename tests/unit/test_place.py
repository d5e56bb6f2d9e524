"""Where checkpoints may lie, and which errors mean that one is damaged. A store is one in memory here: objects, ranges.

tests/run/test_store.py does it all with a server.
"""

import errno
import sys
from pathlib import Path

import fsspec
import pytest
from small_runs import make_run, write_text
from torch import Tensor

from training.checkpoint import folders, place, store
from training.checkpoint.files import read_blocks
from training.checkpoint.manifest import DamagedError, Piece, Stored
from training.checkpoint.store import Remote, UnreachableError
from training.config import CheckpointConfig
from training.loop import train
from training.metrics import read as read_rows


@pytest.fixture
def remote() -> Remote:
    """A prefix that nothing is below, in a store that forgets all."""
    system = fsspec.filesystem("memory", skip_instance_cache=True)
    system.store.clear()
    return Remote(system, "/kept/one")


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("the network has gone")


WRONG = {
    "": "must be a folder, or a URL such as s3://bucket/prefix",
    "s3://": "must be a folder, or a URL such as s3://bucket/prefix",
    "://bucket": "must be a folder, or a URL such as s3://bucket/prefix",
    "simplecache::s3://bucket": "must be a folder, or a URL such as s3://bucket/prefix",
    "s3://key:a/secret@bucket/prefix": r"s3://\.\.\.@bucket/prefix must have no credentials in it",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"checkpoint.folder=.*{WRONG[text]}") as caught:
        CheckpointConfig(folder=text)
    assert "secret" not in str(caught.value)


def test_what_is_a_place_is_not() -> None:
    for text in ("kept", "/shared/kept", "s3://bucket", "s3://bucket/a/b/", "abfs://container@account.example/kept"):
        assert CheckpointConfig(folder=text).folder == text


def test_a_store_that_nothing_here_knows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for text, rule in {
        "s4://bucket/x": "must be a folder, or a URL such as s3://bucket/prefix: Protocol not known: s4",
        "gs://bucket/x": r"needs a package: .*gcsfs.* \(for s3://: pip install 'shoestring\[store\]'\)",
        "memory://x": "must be a folder without memory://, or in a store that every rank reaches",
        "file:///x": "must be a folder without file://",
    }.items():
        with pytest.raises(ValueError, match=f"checkpoint.folder={text} {rule}"):
            place.parse(text)


def test_every_run_has_a_place_of_its_own(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    assert folders.find_root(None, run) == run / "checkpoints"
    assert folders.find_root(str(tmp_path / "kept"), run) == tmp_path / "kept" / "one"
    assert folders.find(tmp_path / "kept" / "one") == []


def test_an_object_is_there_once_it_is_whole(remote: Remote) -> None:
    assert not (remote / "a").exists() and list(folders.find_damaged(remote)) == []
    with place.create(remote / "a") as file:
        assert file.write(b"0123") == 4 and file.write(memoryview(b"456789")) == 6
    place.replace_text(remote / "b", "ä")
    assert (remote / "a").read_bytes() == b"0123456789" and (remote / "b").read_text("utf-8") == "ä"
    assert sorted(path.name for path in remote.iterdir()) == ["a", "b"] and str(remote / "a") == "memory:///kept/one/a"
    moved = remote.rename(remote.with_name("two"))
    assert not remote.exists() and (moved / "a").read_bytes() == b"0123456789"
    place.remove(moved)
    place.remove(moved)
    assert not moved.exists()


def test_it_is_read_in_ranges(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(100))
    (remote / "a").write_bytes(content)
    monkeypatch.setattr(store, "RANGE", 7)
    for start, size in ((0, 100), (3, 7), (50, 28), (90, 10), (95, 30), (100, 4), (0, 0)):
        into = bytearray(size)
        with (remote / "a").open("rb") as file:
            file.seek(start)
            assert file.readinto(into) == len(content[start : start + size])
        assert into.rstrip(b"\0") == content[start : start + size].rstrip(b"\0")


def test_what_is_gone_is_damage_and_what_does_not_answer_is_not(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Stored((4,), "uint8", (piece := Piece((0,), (4,), "00000.safetensors", 0, ("0" * 64,)),))

    def read(folder: place.Place) -> Tensor:
        return read_blocks(folder, "w", stored, piece, range(4))

    for folder in (tmp_path, remote):
        for look in (read, folders.read_manifest):
            with pytest.raises(DamagedError, match=r"(w at \[0\]|manifest.json) cannot be read: .*[Nn]o such"):
                look(folder)
    for name in ("cat_ranges", "cat_file", "size"):
        monkeypatch.setattr(remote.system, name, refuse)
    for look in (read, folders.read_manifest):
        with pytest.raises(UnreachableError, match=r"checkpoint.folder: .*RuntimeError: the network has gone"):
            look(remote)


def test_a_store_that_does_not_answer_has_nothing_set_aside(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has its checkpoints there, and cannot read them; then it can."""
    write_text(tmp_path)
    config = make_run(tmp_path, steps=4)
    config.run.sample.tokens, config.checkpoint.every = 0, 2
    monkeypatch.setattr(folders, "find_root", lambda folder, run: remote)
    train(config, tmp_path)
    assert folders.find(remote) == [2, 4]
    record = (tmp_path / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        for name in ("cat_ranges", "size"):
            patch.setattr(remote.system, name, refuse)
        with pytest.raises(ValueError, match=r"^checkpoint.folder: .*safetensors: .*: the network has gone"):
            train(config, tmp_path)
    assert folders.find(remote) == [2, 4] and not folders.find_damaged(remote)
    assert (tmp_path / "metrics.jsonl").read_text() == record
    assert train(config, tmp_path).steps == 4


def test_a_folder_of_ones_own_choice(tmp_path: Path) -> None:
    write_text(tmp_path)
    config = make_run(tmp_path, steps=3)
    config.run.sample.tokens, config.checkpoint.every = 0, 2
    config.checkpoint.folder = str(tmp_path / "kept")
    for steps in (3, 4):
        config.run.steps = steps
        (tmp_path / "one").mkdir(exist_ok=True)
        assert train(config, tmp_path / "one").steps == steps
    assert folders.find(tmp_path / "kept" / "one") == [3, 4] and not (tmp_path / "one" / "checkpoints").exists()
    assert [row["step"] for row in read_rows(tmp_path / "one" / "metrics.jsonl", "resume")] == [3]


@pytest.mark.parametrize("number", [errno.EACCES, errno.ETIMEDOUT, errno.ESTALE, errno.EMFILE])
def test_a_folder_may_not_answer_either(number: int) -> None:
    found = place.explain(OSError(number, "why"), "kept/manifest.json")
    assert isinstance(found, UnreachableError) and not isinstance(found, DamagedError)
    assert str(found) == "checkpoint.folder: kept/manifest.json cannot be read or written: why"
    assert isinstance(place.explain(OSError(errno.EIO, "why"), "x"), DamagedError)
