"""Which texts there are, which are held out, and that every byte of them is tokenised once."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.data import listing
from training.data.corpus import Document, Source, cut, find_sources, is_held_out, list_documents
from training.data.listing import (
    SPLITS,
    choose_width,
    count_pieces,
    list_pieces,
    plan_shards,
    read_piece,
    take_listings,
    take_survey,
)


def write(folder: Path, **texts: str) -> None:
    """Writes files; ``__`` in a name is a folder's end, ``_`` the dot."""
    for name, text in texts.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def paths(folder: Path, share: float = 0.5) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, document in list_documents(find_sources([str(folder)]), share):
        found[split].append(document.path)
    return found


def test_folder_is_walked_by_name(tmp_path: Path) -> None:
    write(tmp_path, b_txt="1", a__z_md="2", a__b__c_py="3", a_rst="4", c_bin="5", d_txt="", _git__x_txt="6")
    write(tmp_path, **{"__pycache____x_pyc": "7"})
    (tmp_path / "broken.txt").symlink_to("nowhere")
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "linked.txt").symlink_to(tmp_path / "b.txt")
    found = [document.path for _, document in list_documents(find_sources([str(tmp_path)]), 0.5)]
    assert found == ["a/b/c.py", "a/z.md", "a.rst", "b.txt", "linked.txt"]


def test_other_files_move_nothing_across(tmp_path: Path) -> None:
    write(tmp_path, **{f"{i:03}_txt": "text" for i in range(200)})
    before = paths(tmp_path)
    assert 60 < len(before["held_out"]) < 140
    for i in range(0, 200, 2):
        (tmp_path / f"{i:03}.txt").unlink()
    after = paths(tmp_path)
    for split in SPLITS:
        assert after[split] == [path for path in before[split] if int(path[:3]) % 2]


def test_a_larger_share_holds_out_more_of_the_same() -> None:
    names = [f"folder/{i}.py" for i in range(1000)]
    few = {name for name in names if is_held_out(name.encode(), 0.05)}
    many = {name for name in names if is_held_out(name.encode(), 0.2)}
    assert few < many and 25 < len(few) < 80 and 150 < len(many) < 250


def test_a_file_alone_is_cut_in_two(tmp_path: Path) -> None:
    path = tmp_path / "book.anything"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    (_, first), (_, second) = list_documents(find_sources([str(path)]), 0.1)
    assert (first.start, first.stop, second.stop) == (0, second.start, path.stat().st_size)
    assert path.read_bytes()[second.start :].startswith(b"line ")
    assert 0.89 < first.stop / first.size < 0.92


def test_stdlib_is_only_the_standard_library() -> None:
    found = [document.path for _, document in list_documents(find_sources(["stdlib"]), 0.05)]
    assert "argparse.py" in found and "email/message.py" in found and all(path.endswith(".py") for path in found)
    assert not any("site-packages" in path for path in found)


@pytest.mark.parametrize("offset", range(1, 13))
def test_text_is_never_cut_inside_a_character(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("🙂🙂🙂ä")
    with path.open("rb") as file:
        where = cut(file.fileno(), offset, 0, 14)
        content = file.read()
    assert offset <= where <= offset + 3
    assert content[:where].decode() + content[where:].decode() == "🙂🙂🙂ä"


def test_text_is_cut_after_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\nthree\n")
    with path.open("rb") as file:
        assert [cut(file.fileno(), offset, 0, 14) for offset in (0, 2, 3, 4, 9, 14, 20)] == [0, 4, 4, 8, 9, 14, 14]


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[tuple[Source, ...], Path]]:
    """Texts of 1 to 3000 bytes, in pieces of 100."""
    monkeypatch.setattr(listing, "PIECE", 100)
    monkeypatch.setattr("training.data.corpus.WINDOW", 50)
    for i in range(60):
        size = (i * i * 37) % 301 * (10 if i % 7 == 0 else 1) + 1
        (tmp_path / f"{i:02}.txt").write_text("".join("é\n"[(j * j) % 11 == 0] for j in range(size)))
    yield find_sources([str(tmp_path)]), tmp_path


@pytest.mark.parametrize("width", [100, 101, 250, 1000, 100_000])
def test_shards_hold_every_byte_once(
    corpus: tuple[tuple[Source, ...], Path], tmp_path_factory: pytest.TempPathFactory, width: int
) -> None:
    sources, folder = corpus
    out = tmp_path_factory.mktemp("listings")
    survey = take_survey(sources, 0.3)
    take_listings(sources, 0.3, out, survey)
    for split in SPLITS:
        texts: dict[str, str] = {}
        plans = list(plan_shards(out, split, width))
        assert [plan.number for plan in plans] == sorted({plan.number for plan in plans})
        for plan in plans:
            pieces = list(list_pieces(out, plan))
            assert pieces, "no shard is empty"
            for document, number in pieces:
                with (folder / document.path).open("rb") as file:
                    texts[document.path] = texts.get(document.path, "") + read_piece(file, document, number)
        expected = [document.path for where, document in list_documents(sources, 0.3) if where == split]
        assert list(texts) == expected
        assert len(texts) == survey.documents[split]
        assert all(text == (folder / path).read_text() for path, text in texts.items())
        assert sum(len(text.encode()) for text in texts.values()) == survey.size[split]


def test_any_change_of_a_file_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, a_txt="a", b_txt="b")
    sources = find_sources([str(tmp_path)])
    seen = {take_survey(sources, 0.5).digest}
    assert take_survey(sources, 0.5).digest in seen
    for change in (
        lambda: write(tmp_path, a_txt="c"),
        lambda: write(tmp_path, c_txt="new"),
        lambda: (tmp_path / "b.txt").rename(tmp_path / "bb.txt"),
        lambda: os.utime(tmp_path / "a.txt", ns=(1, 1)),
        lambda: (tmp_path / "a.txt").unlink(),
    ):
        change()
        digest = take_survey(sources, 0.5).digest
        assert digest not in seen
        seen.add(digest)


def test_listings_must_match_the_survey(tmp_path: Path) -> None:
    write(tmp_path, text__a_txt="a", text__b_txt="b")
    sources = find_sources([str(tmp_path / "text")])
    survey = take_survey(sources, 0.5)
    write(tmp_path, text__c_txt="c")
    with pytest.raises(ValueError, match=r"data\.corpus changed"):
        take_listings(sources, 0.5, tmp_path, survey)


def read_whole(path: Path) -> str:
    status = path.stat()
    with path.open("rb") as file:
        document = Document(0, path.name, 0, status.st_size, status.st_size, status.st_mtime_ns)
        assert count_pieces(document) == 1
        return read_piece(file, document, 0)


def test_odd_bytes_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xe9\r\n\x00\xf0\x9f\x99")
    assert read_whole(path) == "caf\ufffd\r\n\x00\ufffd"


def test_names_need_not_be_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/\xff\n.txt"
    with open(raw, "wb") as file:
        file.write(b"x")
    _, document = next(list_documents(find_sources([str(tmp_path)]), 0.5))
    assert Document.from_row(document.to_row()) == document
    assert document.to_row().count(b"\n") == 1 and (tmp_path / document.path).read_text() == "x"


def test_a_text_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    document = Document(0, "a.txt", 0, 1, 1, 12345)
    with path.open("rb") as file, pytest.raises(ValueError, match=r"a\.txt changed"):
        read_piece(file, document, 0)


@pytest.mark.parametrize(("names", "said"), [(["/nowhere"], "no such file"), (["stdlib", "stdlib"], "named twice")])
def test_mistakes_are_named(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=f"data.corpus={names[0]}.*{said}"):
        find_sources(names)


def test_shards_stay_countable() -> None:
    assert choose_width(1) == listing.NARROWEST >= listing.PIECE
    for size in (10**6, 10**9, 10**11):
        assert size / choose_width(size) <= 257
    assert choose_width(10**13) == 1 << 30
