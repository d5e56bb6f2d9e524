"""Fill-in-the-middle: nothing of a text is lost, as many are cut as asked for, anywhere, and always the same ones."""

import statistics
from pathlib import Path

import numpy as np
import pytest

from training.data.config import DataConfig
from training.data.middle import cut_middle
from training.data.prepare import prepare

TEXTS = [f"document {i}: " + "naïve 漢字 🙂 " * (i % 9) for i in range(2000)]


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_parts_are_the_text_and_as_many_as_asked_for(rate: float) -> None:
    cuts = [cut_middle(text, rate) for text in TEXTS]
    assert sum(cut is not None for cut in cuts) == pytest.approx(rate * len(TEXTS), abs=50 * bool(rate % 1))
    for text, cut in zip(TEXTS, cuts, strict=True):
        if cut is not None:
            prefix, suffix, middle = cut
            assert prefix + middle + suffix == text
    assert cuts == [cut_middle(text, rate) for text in TEXTS]


def test_cuts_are_anywhere_and_a_higher_rate_cuts_the_same_ones() -> None:
    text = [f"{i:06d}" + "x" * 94 for i in range(3000)]
    few, all_of_them = ([cut_middle(each, rate) for each in text] for rate in (0.3, 1.0))
    assert all(a is None or a == b for a, b in zip(few, all_of_them, strict=True))
    parts = [tuple(map(len, cut)) for cut in all_of_them if cut is not None]
    # Two cuts drawn evenly: each of the three parts has a third on average.
    assert all(statistics.mean(part[i] for part in parts) == pytest.approx(33, abs=1.5) for i in range(3))
    assert {0, 100} <= {part[2] for part in parts} | {part[0] for part in parts}
    assert cut_middle("", 1.0) is None


def test_what_is_trained_on_has_it_and_what_is_held_out_has_not(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS[:300]):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    words = {"sequence_length": 8, "corpus": (str(tmp_path / "text"),), "folder": str(tmp_path), "held_out": 0.2}
    plain, cut = (prepare(DataConfig(**words, fim=fim), lambda line: None) for fim in (0.0, 0.5))  # type: ignore[arg-type]
    assert plain.folder != cut.folder
    ids = [row.read(0, row.tokens)[0] for row in (plain.train, cut.train)]
    count = int((ids[1] == 257).sum())
    assert count == pytest.approx(0.5 * cut.train.documents, abs=25) and not (ids[0] > 256).any()
    assert len(ids[1]) == len(ids[0]) + 3 * count and plain.train.documents == cut.train.documents
    tokens, firsts = cut.train.read(0, cut.train.tokens)
    found = []
    for start, end in zip(firsts, [*firsts[1:], len(tokens)], strict=True):
        row = tokens[start : end - 1]
        if row[0] == 257:
            hole, end_of_hole = (int(np.flatnonzero(row == token)[0]) for token in (258, 259))
            row = np.concatenate((row[1:hole], row[end_of_hole + 1 :], row[hole + 1 : end_of_hole]))
        found.append(bytes(row.tolist()).decode())
    held = [row.read(0, row.tokens)[0].tolist() for row in (plain.held_out, cut.held_out)]
    assert held[0] == held[1] and set(found) < set(TEXTS[:300])


def test_a_tokenizer_without_the_tokens_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.BPE({"a": 0, "<|endoftext|>": 1}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("aaa\naaa\n")
    config = DataConfig(
        sequence_length=8, corpus=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "tokenizer.json"), fim=0.1
    )
    with pytest.raises(ValueError, match=r"^data\.fim=0\.1 needs three tokens, .* has none of the usual: <\|fim_beg"):
        prepare(config)
    with pytest.raises(ValueError, match=r"^data\.fim=1\.5 must lie in 0\.\.1"):
        DataConfig(sequence_length=8, fim=1.5)
