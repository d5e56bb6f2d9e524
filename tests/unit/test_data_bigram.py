"""The bigram baseline against counting by hand, on the labels that an evaluation counts."""

from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest

from training.data import bigram
from training.data.batches import Batches
from training.data.bigram import ALPHAS, bigram_loss
from training.data.tokens import ShardWriter, TokenFile

V = 7


def write(folder: Path, name: str, tokens: list[int], starts: list[int]) -> TokenFile:
    writer = ShardWriter(folder / name, np.dtype("<u2"))
    writer.append(np.array(tokens), starts)
    return TokenFile(folder, [writer.finish(0, 0)], np.dtype("<u2"), 0)


@pytest.fixture
def splits(tmp_path: Path) -> tuple[TokenFile, TokenFile]:
    rng = np.random.default_rng(0)
    text = rng.integers(0, 5, 3000).tolist(), rng.integers(0, 6, 203).tolist()
    return write(tmp_path, "train", text[0], [0, 1000]), write(tmp_path, "held_out", text[1], [0, 50, 51, 120])


def count_by_hand(fitted: list[int], labels: list[tuple[int, int]]) -> float:
    pairs, firsts = Counter(pairwise(fitted)), Counter(fitted[:-1])
    return min(
        -sum(log((pairs[a, b] + alpha) / (firsts[a] + alpha * V)) for a, b in labels) / len(labels) for alpha in ALPHAS
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk", [1 << 24, 64])
def test_loss_is_the_one_counted_by_hand(
    splits: tuple[TokenFile, TokenFile], masked: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bigram, "CHUNK", chunk)
    train, held_out = splits
    text = held_out.read(0, 203)[0].tolist()
    skipped = {50, 51, 120} if masked else set()
    labels = [(text[i - 1], text[i]) for i in range(1, 203) if i not in skipped]
    batches = Batches(held_out, sequence_length=16, lookahead=2, mask_documents=masked)
    expected = count_by_hand(train.read(0, 3000)[0].tolist(), labels)
    assert bigram_loss(train, batches, V) == pytest.approx(expected, rel=1e-12)


def test_loss_of_a_part(splits: tuple[TokenFile, TokenFile]) -> None:
    train, held_out = splits
    batches = Batches(held_out, sequence_length=16, shuffle=False)
    text = held_out.read(0, 33)[0].tolist()
    expected = count_by_hand(train.read(0, 500)[0].tolist(), list(pairwise(text)))
    assert bigram_loss(train, batches, V, sequences=2, limit=500) == pytest.approx(expected, rel=1e-12)


def test_large_vocabularies_are_refused(splits: tuple[TokenFile, TokenFile]) -> None:
    train, held_out = splits
    with pytest.raises(ValueError, match="129280 tokens needs a table of"):
        bigram_loss(train, Batches(held_out, sequence_length=16), 129280)
