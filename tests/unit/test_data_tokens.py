"""Token files read back what was written, and damage is found and named."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.data.index import NAME, Index, read_index, verify, write_index
from training.data.journal import keep_present, read_journal, write_row
from training.data.tokens import Shard, ShardWriter, TokenFile

SIZES = (700, 1, 0, 1300, 64)  # tokens of the shards


@pytest.fixture(params=["<u2", "<u4"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A complete folder: token i of the training split is i, a document begins at every multiple of 97."""
    dtype = np.dtype(request.param)
    shards, start = [], 0
    for number, size in enumerate(SIZES):
        writer = ShardWriter(tmp_path / f"train-{number:05}.tokens", dtype)
        for low in range(start, start + size, 300):
            tokens = np.arange(low, min(low + 300, start + size))
            writer.append(tokens, np.flatnonzero(tokens % 97 == 0).tolist())
        shards.append(writer.finish(text_bytes=size, replaced=0))
        start += size
    writer = ShardWriter(tmp_path / "held_out-00000.tokens", dtype)
    writer.append(np.arange(5), [0])
    held_out = [writer.finish(text_bytes=5, replaced=0)]
    identity = {"held_out": 0.05}
    write_index(tmp_path, Index(["/text"], identity, dtype.str, 9, {"train": shards, "held_out": held_out}))
    return tmp_path


def open_split(folder: Path) -> TokenFile:
    return read_index(folder).open(folder, "train")


def test_any_stretch_reads_as_written(folder: Path) -> None:
    tokens = open_split(folder)
    assert (tokens.tokens, tokens.documents, tokens.eos) == (sum(SIZES), 22, 9)
    for start in (0, 96, 97, 698, 699, 700, 701, 702, 1999, 2000, 2064):
        for stop in (start, start + 1, start + 3, start + 98, 2065):
            if start <= stop <= 2065:
                ids, firsts = tokens.read(start, stop)
                assert np.array_equal(ids, np.arange(start, stop))
                assert firsts.tolist() == [i - start for i in range(start, stop) if i % 97 == 0]


def test_sizes_are_known_beforehand(folder: Path) -> None:
    index = read_index(folder)
    for shard in index.splits["train"] + index.splits["held_out"]:
        assert (folder / shard.file).stat().st_size == shard.count_bytes(np.dtype(index.dtype).itemsize)
    assert not list(folder.glob("*.partial"))


def test_all_is_verified_within_the_budget(folder: Path) -> None:
    index = read_index(folder)
    whole = sum(path.stat().st_size for path in folder.glob("*.tokens"))
    assert verify(folder, index, float("inf")) == verify(folder, index, whole) == whole
    assert verify(folder, index, 0) == 0
    assert 0 < verify(folder, index, whole * 0.6) < whole


@pytest.mark.parametrize("name", [f"train-{i:05}.tokens" for i in (0, 1, 3, 4)] + ["held_out-00000.tokens"])
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 0x10
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{folder / name} is corrupted: .*shoestring prepare"):
        verify(folder, read_index(folder), float("inf"))


@pytest.mark.parametrize(("length", "said"), [(-1, "truncated"), (1, "too long"), (None, "missing")])
def test_sizes_are_checked_without_a_budget(folder: Path, length: int | None, said: str) -> None:
    path = folder / "train-00003.tokens"
    content = path.read_bytes()
    path.unlink()
    if length is not None:
        path.write_bytes(content[:length] if length < 0 else content + b"x")
    with pytest.raises(ValueError, match=f"{path} is {said}"):
        verify(folder, read_index(folder), 0)


def damage(content: dict, change: str) -> str:
    if change == "cut off":
        return json.dumps(content)[:-50]
    if change == "a count":
        content["splits"]["train"][0]["tokens"] += 1
    elif change == "a field":
        del content["splits"]["train"][0]["crc32"]
    elif change == "dtype":
        content["dtype"] = "|O"
    elif change == "a list":
        return "[]"
    return json.dumps(content)


@pytest.mark.parametrize("change", ["cut off", "a count", "a field", "dtype", "a list"])
def test_damaged_index_is_found(folder: Path, change: str) -> None:
    path = folder / NAME
    path.write_text(damage(json.loads(path.read_text()), change))
    with pytest.raises(ValueError, match=f"{path} is damaged"):
        read_index(folder)


def test_another_format_is_refused(folder: Path) -> None:
    path = folder / NAME
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="format 2"):
        read_index(folder)


def test_digest_is_of_the_tokens_alone(folder: Path) -> None:
    index = read_index(folder)
    assert index._replace(sources=["/elsewhere"], identity={}).digest == index.digest
    assert index._replace(eos=8).digest != index.digest


def test_journal_ends_with_its_last_whole_line(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []
    shards = [Shard(f"train-{i:05}.tokens", 4, 1, 4, 0, i) for i in range(3)]
    path = tmp_path / "journal.jsonl"
    with path.open("a") as record:
        for shard in shards:
            write_row(shard, record)
    path.write_bytes(path.read_bytes()[:-5])
    assert read_journal(tmp_path) == shards[:2]
    with path.open("a") as record:
        write_row(shards[2], record)
    assert read_journal(tmp_path) == shards


def test_only_files_of_the_right_size_are_kept(folder: Path) -> None:
    index = read_index(folder)
    itemsize = np.dtype(index.dtype).itemsize
    (folder / "train-00000.tokens").unlink()
    with (folder / "train-00004.tokens").open("ab") as file:
        file.write(b"more")
    kept = keep_present(index.splits["train"], folder, itemsize)
    assert sorted(kept) == [f"train-{i:05}.tokens" for i in (1, 2, 3)]
