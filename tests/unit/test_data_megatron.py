"""Megatron's token files, written by its own library: read where they are, document by document."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from training.data.config import DataConfig
from training.data.megatron import MegatronFile, open_megatron
from training.data.prepare import prepare

WRITE = """
import sys, numpy
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
folder = sys.argv[1]
for name, dtype in (("short", numpy.uint16), ("wide", numpy.int32)):
    builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=dtype)
    generator = numpy.random.default_rng(0)
    for _ in range(50):  # documents of one to three sequences, some of them empty
        lengths = generator.integers(0, 9, generator.integers(1, 4)).tolist()
        builder.add_document(generator.integers(0, 256, sum(lengths)), lengths)
    builder.finalize(f"{folder}/{name}.idx")
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    subprocess.run([sys.executable, "-W", "ignore", "-c", WRITE, folder], check=True, capture_output=True)
    return folder


def expect() -> list[list[int]]:
    """The documents that are written."""
    generator, documents = np.random.default_rng(0), []
    for _ in range(50):
        lengths = generator.integers(0, 9, generator.integers(1, 4)).tolist()
        documents.append(generator.integers(0, 256, sum(lengths)).tolist())
    return documents


def read_documents(split: MegatronFile) -> list[list[int]]:
    tokens, firsts = split.read(0, split.tokens)
    ends = [*firsts[1:], len(tokens)]
    return [tokens[start:end].tolist() for start, end in zip(firsts, ends, strict=True)]


@pytest.mark.parametrize("name", ["short.idx", "wide.bin"])
def test_documents_are_as_written(name: str, written: Path) -> None:
    splits, _ = open_megatron(str(written / name), 0.2, eos=0)
    train, held_out = splits["train"], splits["held_out"]
    assert read_documents(train) + read_documents(held_out) == expect()
    assert (train.documents + held_out.documents, train.tokens + held_out.tokens) == (50, sum(map(len, expect())))
    assert 0.1 < held_out.tokens / (train.tokens + held_out.tokens) < 0.25
    whole, firsts = train.read(0, train.tokens)
    for start in range(0, train.tokens, 7):
        tokens, inside = train.read(start, min(start + 11, train.tokens))
        assert (tokens == whole[start : start + 11]).all()
        assert inside.tolist() == [first - start for first in firsts if start <= first < start + 11]


def test_a_run_reads_it(written: Path) -> None:
    found = prepare(DataConfig(sequence_length=8, corpus=(str(written / "short.idx"),), held_out=0.2))
    again = prepare(DataConfig(sequence_length=8, corpus=(str(written / "short.bin"),), held_out=0.2))
    other = prepare(DataConfig(sequence_length=8, corpus=(str(written / "wide.bin"),), held_out=0.2))
    assert found.digest == again.digest != other.digest and found.verified == 2 * sum(map(len, expect()))


def test_mistakes_are_named(written: Path, tmp_path: Path) -> None:
    both = tuple(str(written / name) for name in ("short.idx", "wide.idx"))
    with pytest.raises(ValueError, match=r"^data\.corpus=.*short\.idx,.*wide\.idx must be one pair of Megatron"):
        prepare(DataConfig(sequence_length=8, corpus=both))
    with pytest.raises(ValueError, match=r"^data\.held_out=0\.0001 leaves one split"):
        prepare(DataConfig(sequence_length=8, corpus=both[:1], held_out=0.0001))
    content, index = ((written / f"short.{suffix}").read_bytes() for suffix in ("bin", "idx"))
    for name, bad_index, bad_content, says in (
        ("magic", b"X" + index[1:], content, "does not begin with MMIDIDX"),
        ("version", index[:9] + b"\x02" + index[10:], content, "has version 2"),
        ("float", index[:17] + b"\x07" + index[18:], content, "dtype 7"),
        ("cut", index[:200], content, "is truncated"),
        ("short", index, content[:-2], "bytes, which is not what"),
    ):
        (tmp_path / f"{name}.idx").write_bytes(bad_index)
        (tmp_path / f"{name}.bin").write_bytes(bad_content)
        with pytest.raises(ValueError, match=says):
            open_megatron(str(tmp_path / f"{name}.idx"), 0.2, eos=0)
    large = np.frombuffer(content, "<u2").copy()
    large[-1] = 999
    (tmp_path / "large.idx").write_bytes(index)
    (tmp_path / "large.bin").write_bytes(large.tobytes())
    with pytest.raises(ValueError, match=r"data\.tokenizer has 264 tokens, and .* was made with another: it has 999"):
        prepare(DataConfig(sequence_length=8, corpus=(str(tmp_path / "large.bin"),), held_out=0.2))
