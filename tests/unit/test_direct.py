"""A file written past the cache has all of its bytes, whatever their number, wherever the file system knows of that."""

import os
import random
from pathlib import Path

import pytest

from training.checkpoint.direct import ALIGNED, SIZE, Direct


def write(path: Path, parts: list[bytes]) -> Direct:
    file = Direct(path)
    try:
        assert [file.write(part) for part in parts] == [len(part) for part in parts]
        file.finish()
    finally:
        file.close()
    return file


def draw(sizes: list[int]) -> list[bytes]:
    generator = random.Random(sum(sizes))  # noqa: S311 (no secret)
    return [generator.randbytes(size) for size in sizes]


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        [0, 1],
        [ALIGNED],
        [7, ALIGNED - 7, ALIGNED, 1],
        [SIZE],
        [SIZE - 1, 2, SIZE],
        [3 * SIZE + 5 * ALIGNED + 11, 13],
    ],
    ids=str,
)
@pytest.mark.parametrize("root", ["a disk", "/dev/shm"])  # noqa: S108
def test_all_bytes_are_there(tmp_path: Path, root: str, sizes: list[int]) -> None:
    """Memory has no way past the cache on many machines, and does without."""
    path = (tmp_path if root == "a disk" else Path(root)) / f"direct-{os.getpid()}"
    parts = draw(sizes)
    try:
        path.write_bytes(b"what was there before, which is longer" * SIZE if sizes == [] else b"")
        assert write(path, parts).position == sum(sizes)
        assert path.read_bytes() == b"".join(parts)
    finally:
        path.unlink()


def test_a_disk_that_wants_whole_pages_only_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused past the cache goes through it."""
    refused, real = list[int](), os.write

    def write_some(file: int, content: memoryview) -> int:
        if not refused:
            refused.append(len(content))
            raise OSError(22, "Invalid argument")
        return real(file, content[: len(content) // 2 + 1])

    monkeypatch.setattr(os, "write", write_some)
    parts = draw([SIZE + 77])
    if Direct(tmp_path / "probe")._direct:
        assert write(tmp_path / "a", parts).position == SIZE + 77 and refused == [SIZE]
        assert (tmp_path / "a").read_bytes() == parts[0]


def test_what_fails_is_said_with_how_far_it_came() -> None:
    file = Direct("/dev/full")
    file.write(b"x" * 100)
    with pytest.raises(OSError, match="No space left on device"):
        file.finish()
    file.close()
    assert file.position == 0
