"""``shoestring prepare`` over files of records: what is there, what is held out, what is malformed, and how it ends."""

import json
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from test_data_records import write_lines
from test_prepare import fingerprint, prepare, start

from training.data.index import SPLITS, Index, read_index
from training.data.tokens import TokenFile

TEXTS = [f"record {i}: {'naïve words, ' * (i % 50)}\n" for i in range(6000)]
WORDS = ("data.corpus=[set]", "data.held_out=0.1")


def read_documents(file: TokenFile) -> list[str]:
    """The texts of a split, whose tokens are bytes."""
    tokens, firsts = file.read(0, file.tokens)
    ends = [*firsts[1:], len(tokens)]
    assert all(tokens[end - 1] == file.eos for end in ends)
    return [bytes(tokens[start : end - 1].tolist()).decode() for start, end in zip(firsts, ends, strict=True)]


def open_index(root: Path) -> tuple[Path, Index]:
    (folder,) = (path.parent for path in (root / "data").glob("*/index.json"))
    return folder, read_index(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of every kind in a folder, some of them twice; one text file; four malformed ones."""
    place = tmp_path_factory.mktemp("records")
    (place / "set" / "more").mkdir(parents=True)
    records = [{"text": text} for text in TEXTS]
    bad = ["no record", {"else": 1}]
    write_lines(place / "set" / "a.jsonl", [*records[:3000], *bad, *records[3000:4000]])
    write_lines(place / "set" / "b.jsonl.gz", [*records[4000:4500], {"text": 7}])
    write_lines(place / "set" / "more" / "c.ndjson.zst", [*records[4500:5000], {"text": ""}])
    table = arrow.table({"text": [*TEXTS[5000:], None, *TEXTS[:500]]})
    parquet.write_table(table, place / "set" / "d.parquet", row_group_size=100)
    (place / "set" / "e.txt").write_text("a text\n")
    said = prepare(*WORDS, folder=place)
    assert "4 malformed records were left out" in said and f"{place}/set/a.jsonl:3001: no JSON: " in said
    return place


def test_every_record_is_a_document_once(place: Path) -> None:
    folder, index = open_index(place)
    found = {split: read_documents(index.open(folder, split)) for split in SPLITS}
    assert sorted(found["train"] + found["held_out"]) == sorted([*TEXTS, *TEXTS[:500], "a text\n"])
    assert not set(found["train"]) & set(found["held_out"])  # a text that is there twice is on one side
    assert 0.08 < len(found["held_out"]) / len(TEXTS) < 0.12


def test_malformed_records_are_all_kept_by_name(place: Path) -> None:
    folder, _ = open_index(place)
    rows = [
        json.loads(line) for path in sorted(folder.glob("*.malformed.jsonl")) for line in path.read_text().splitlines()
    ]
    where = {(Path(row["file"]).name, row["line"]): row["why"] for row in rows}
    assert where.pop(("a.jsonl", 3001)).startswith("no JSON: ")
    assert where == {
        ("a.jsonl", 3002): "no field text",
        ("b.jsonl.gz", 501): "field text is no text",
        ("d.parquet", 1001): "field text is no text",
    }


def test_killed_and_with_other_workers_it_is_the_same(place: Path, tmp_path: Path) -> None:
    (tmp_path / "set").symlink_to(place / "set")
    process = start(*WORDS, "data.workers=1", folder=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("data/*/*.tokens")):
        pass
    process.kill()
    process.communicate()
    prepare(*WORDS, "data.workers=3", folder=tmp_path)
    assert fingerprint(tmp_path / "data").keys() == fingerprint(place / "data").keys()
    assert open_index(tmp_path)[1].digest == open_index(place)[1].digest


def test_malformed_may_end_it(place: Path, tmp_path: Path) -> None:
    (tmp_path / "set").symlink_to(place / "set")
    said = prepare(*WORDS, "data.malformed=fail", "data.workers=1", folder=tmp_path, code=2)
    assert "a.jsonl:3001: no JSON: " in said and "data.malformed=skip leaves such records out" in said


def test_a_field_that_is_nowhere_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ({"text": text} for text in TEXTS[:10]))
    said = prepare("data.corpus=[a.jsonl]", "data.field=content", folder=tmp_path, code=2)
    assert "data.corpus has no text to train on" in said and "a.jsonl:1: no field content" in said
    assert "is ready" in prepare("data.corpus=[a.jsonl]", "data.held_out=0.3", folder=tmp_path)


def test_long_records_are_cut_and_stay_one_document(tmp_path: Path) -> None:
    long = "".join(f"line {i} of a long text\n" for i in range(30_000))
    write_lines(tmp_path / "a.jsonl", [{"text": long}, {"text": "x" * 1_000_000}, *({"text": t} for t in TEXTS[:50])])
    prepare("data.corpus=[a.jsonl]", "data.held_out=0.2", folder=tmp_path)
    folder, index = open_index(tmp_path)
    found = [text for split in SPLITS for text in read_documents(index.open(folder, split))]
    assert sorted(found) == sorted([long, "x" * 1_000_000, *TEXTS[:50]])
