"""``shoestring tokenizer``: a tokenizer of one's own text, and a run that uses it."""

import json
from pathlib import Path

import pytest
from test_data_records import write_lines
from test_prepare import prepare

from launcher.cli import main
from training.data.tokenizer import load_tokenizer

LINE = "The quick brown fox number {} jumps over the lazy dog; naïve words, 漢字 and 🙂 follow.\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text("".join(LINE.format(i * number) for i in range(30)))
    write_lines(tmp_path / "text" / "a.jsonl", ({"text": f"record {i} is of value {i * i}"} for i in range(300)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_what_a_run_takes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "to=mine", "corpus=[text]", "vocab_size=600"]) == 0
    assert "mine/tokenizer.json has 600 tokens; data.tokenizer=mine model.vocab_size=640" in capsys.readouterr().out
    tokenizer = load_tokenizer("mine")
    for text in ("", LINE.format(7), "def f(x):\n\n    return x  # ü🙂", "<|endoftext|>"):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert len(tokenizer.encode(LINE.format(7))) < 0.4 * len(LINE.encode())
    assert tokenizer.fim is not None and tokenizer.eos not in tokenizer.encode("<|endoftext|>")
    said = prepare("data.corpus=[text]", "data.tokenizer=mine", "data.fim=0.1", folder=place)
    assert "vocabulary 600" in said
    # The same text makes the same file.
    assert main(["tokenizer", "to=again", "corpus=[text]", "vocab_size=600"]) == 0
    assert (place / "mine" / "tokenizer.json").read_bytes() == (place / "again" / "tokenizer.json").read_bytes()


def test_of_much_text_a_part_is_looked_at(place: Path) -> None:
    assert main(["tokenizer", "to=few", "corpus=[text]", "vocab_size=2000", "megabytes=0.01"]) == 0
    assert main(["tokenizer", "to=all", "corpus=[text]", "vocab_size=2000"]) == 0
    few, everything = (json.loads((place / name / "tokenizer.json").read_text())["model"] for name in ("few", "all"))
    assert len(few["vocab"]) < len(everything["vocab"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("vocab_size=100",), "vocab_size=100 must be at least 260"),
        (("megabytes=0",), "megabytes=0.0 must be positive"),
        (("held_out=1",), "held_out=1.0 must lie in 0..1"),
        (("corpus=[nowhere]",), "data.corpus=nowhere: no such file or folder"),
        (("to=text/there",), "to=text/there must have no tokenizer.json yet"),
    ],
)
def test_mistakes_are_named(
    words: tuple[str, ...], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "text" / "there").mkdir()
    (place / "text" / "there" / "tokenizer.json").touch()
    assert main(["tokenizer", "to=new", "corpus=[text]", *words]) == 2
    assert message in capsys.readouterr().err and not (place / "new").exists()
