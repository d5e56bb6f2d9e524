"""Files of records: every one is read once, however a file is cut; and what is none is named by its line."""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard

from training.data.records import Bad, read_records

TEXTS = [f"text {i}\nnaïve 漢字 🙂 {'long ' * (i % 40)}" for i in range(500)]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """JSONL, packed as the name says; text is written as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    content = "".join(f"{line}\n" for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.write_bytes(content)
    return path


def read_all(path: Path, cuts: Iterable[int] = (), field: str = "text") -> list[str | Bad]:
    """What is found in the pieces between ``cuts``, one after the other."""
    ends = [0, *sorted(cuts), path.stat().st_size]
    ranges = (range(start, stop) for start, stop in pairwise(ends))
    return [found for piece in ranges for found in read_records(path, piece, field)]


@pytest.mark.parametrize("newline", [True, False], ids=["ended", "not ended"])
def test_lines_are_read_once_wherever_a_file_is_cut(newline: bool, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ({"text": text} for text in TEXTS[:60]))
    if not newline:
        path.write_bytes(path.read_bytes()[:-1])
    size, generator = path.stat().st_size, random.Random(0)  # noqa: S311
    for count in (0, 1, 2, 7, 300):
        assert read_all(path, generator.sample(range(1, size), count)) == TEXTS[:60]
    assert read_all(path, range(1, size)) == TEXTS[:60]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson.zst"])
def test_packed_lines(name: str, tmp_path: Path) -> None:
    assert read_all(write_lines(tmp_path / name, ({"text": text} for text in TEXTS))) == TEXTS
    broken = tmp_path / f"broken{''.join(Path(name).suffixes)}"
    broken.write_bytes((tmp_path / name).read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"broken.* cannot be unpacked: "):
        read_all(broken)


def test_row_groups_are_read_once_wherever_a_file_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = arrow.table({"id": list(range(500)), "text": TEXTS})
    parquet.write_table(table, path, row_group_size=37, use_dictionary=False)
    size, generator = path.stat().st_size, random.Random(0)  # noqa: S311
    assert parquet.ParquetFile(path).num_row_groups == 14
    for count in (0, 1, 5, 40):
        assert read_all(path, generator.sample(range(1, size), count)) == TEXTS
    (tmp_path / "b.parquet").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"b\.parquet is no Parquet file"):
        read_all(tmp_path / "b.parquet")


@pytest.mark.filterwarnings("ignore")  # of the library
def test_what_datasets_keeps_on_disk(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(500))})
    datasets.disable_progress_bars()
    made.save_to_disk(tmp_path / "set", num_shards=3)
    files = sorted((tmp_path / "set").glob("*.arrow"))
    assert len(files) == 3
    assert [found for path in files for found in read_all(path)] == TEXTS
    (tmp_path / "b.arrow").write_bytes(b"no such thing, and not even short")
    with pytest.raises(ValueError, match=r"b\.arrow is no stream of Arrow's"):
        read_all(tmp_path / "b.arrow")


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{'text': 'a'}", "no JSON: "),
    "cut off": ('{"text": "a', "no JSON: "),
    "deep": ("[" * 100_000, "no JSON: "),
    "a list": ([1], "no field text"),
    "another field": ({"content": "a"}, "no field text"),
    "a number": ({"text": 7}, "field text is no text"),
    "null": ({"text": None}, "field text is no text"),
    "half a pair": ('{"text": "\\ud800"}', "field text has half a surrogate pair"),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("kind", BAD)
def test_a_malformed_line_is_named(kind: str, name: str, tmp_path: Path) -> None:
    record, why = BAD[kind]
    path = write_lines(tmp_path / name, [{"text": "one"}, "", {"text": "three"}, record, {"text": "five"}])
    cuts = range(1, path.stat().st_size, 7) if name == "a.jsonl" and kind != "deep" else ()
    one, three, bad, five = read_all(path, cuts)
    assert (one, three, five) == ("one", "three", "five")
    assert isinstance(bad, Bad) and bad.line == 4 and bad.why.startswith(why)


def test_lines_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    one, bad = read_all(path)
    assert one == "one" and isinstance(bad, Bad) and bad.line == 2 and "utf-8" in bad.why


READ = """
import sys
from pathlib import Path
import pyarrow
from training.data.records import read_records, take_text
path = Path(sys.argv[1])
print(sum(map(len, read_records(path, range(path.stat().st_size), "text", take_text))))
print(pyarrow.default_memory_pool().max_memory())
"""


def test_a_row_group_is_not_held(tmp_path: Path) -> None:
    """Of one that is the whole file, a few pages at a time: in a process of its own, whose peak is that of this."""
    path = tmp_path / "one.parquet"
    letters = np.random.default_rng(0).bytes(10**7).hex()
    table = arrow.table({"text": [letters[i : i + 1000] for i in range(0, len(letters), 1000)]})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    assert parquet.ParquetFile(path).num_row_groups == 1
    done = subprocess.run([sys.executable, "-c", READ, str(path)], check=True, capture_output=True, text=True)
    size, peak = map(int, done.stdout.split())
    assert size == len(letters) == 2 * 10**7 and 10**6 < peak < 10**7


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_malformed_row_is_named(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    table = arrow.table({"text": ["one", None, "three"], "data": [{"deep": "x"}, {"deep": "y"}, None]})
    if suffix == "parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    assert read_all(path) == ["one", Bad(2, "field text is no text"), "three"]
    assert read_all(path, field="data.deep") == ["x", "y", Bad(3, "no field data.deep")]
    assert read_all(path, field="else") == [Bad(row, "no field else") for row in (1, 2, 3)]


def test_rows_of_a_large_batch_without_the_field_are_named_once(tmp_path: Path) -> None:
    path, table = tmp_path / "a.arrow", arrow.table({"id": list(range(1500))})
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    assert read_all(path) == [Bad(row, "no field text") for row in range(1, 1501)]


def test_fields_within_fields(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"a": {"b": "deep"}}, {"a": "b"}, {"a": {}}])
    assert read_all(path, field="a.b") == ["deep", Bad(2, "no field a.b"), Bad(3, "no field a.b")]
