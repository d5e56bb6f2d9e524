"""Mixtures: shares as asked for, each sequence once an epoch, the same however it is read, weights that change."""

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import Batch
from training.data.config import DataConfig, parse_weights
from training.data.mixture import BLOCK, Mixture, weigh


class Counted:
    """A corpus of so many sequences, each of which says which corpus it is of and at which position it was read."""

    def __init__(self, number: int, sequences: int = 1000) -> None:
        self.number, self.sequences, self.sequence_length = number, sequences, 2

    def read(self, first: int, count: int) -> Batch:
        ids = torch.tensor([[self.number, first + row] for row in range(count)])
        return Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)


def mix(weights: dict[str, str], total: int = 50 * BLOCK, seed: int = 0) -> Mixture:
    parts = [Counted(number, 1000 * (number + 1)) for number in range(len(weights))]
    return Mixture(parts, [*parse_weights(weights).values()], total, seed)


def read(mixture: Mixture, first: int, count: int) -> list[tuple[int, int]]:
    return [(int(number), int(place)) for number, place in mixture.read(first, count).ids]


@pytest.mark.parametrize("weights", [{"a": "1"}, {"a": "0.7", "b": "0.3"}, {"a": "3", "b": "0.001", "c": "2"}])
def test_shares_are_as_asked_for_at_every_moment(weights: dict[str, str]) -> None:
    mixture, total = mix(weights), 20 * BLOCK
    found = read(mixture, 0, total)
    wanted = weigh([*parse_weights(weights).values()], np.zeros(1))[0]
    for stop in (BLOCK, 5 * BLOCK, total):
        counts = Counter(number for number, _ in found[:stop])
        for number, share in enumerate(wanted):
            assert abs(counts[number] - share * stop) <= 2 + 0.1 * share * BLOCK
    for number in range(len(weights)):
        places = [place for each, place in found if each == number]
        # None twice, and none skipped but in the block that is not read to its end.
        assert len(set(places)) == len(places)
        assert set(range(len(places) - BLOCK)) <= set(places) and max(places, default=0) < len(places) + BLOCK


def test_corpora_alternate_within_a_block() -> None:
    numbers = [number for number, _ in read(mix({"a": "1", "b": "1"}), 0, BLOCK)]
    changes = sum(a != b for a, b in pairwise(numbers))
    assert 0.4 * BLOCK < changes < 0.6 * BLOCK


def test_a_position_is_the_same_however_it_is_read() -> None:
    mixture = mix({"a": "0.5", "b": "0.3", "c": "0.2"})
    whole = read(mixture, 0, 3000)
    assert [each for first in range(0, 3000, 7) for each in read(mixture, first, 7)][:3000] == whole
    assert read(mix({"a": "0.5", "b": "0.3", "c": "0.2"}), 1500, 100) == whole[1500:1600]
    assert read(mix({"a": "0.5", "b": "0.3", "c": "0.2"}, seed=1), 0, 3000) != whole
    # Without a schedule it does not depend on how long the run is.
    assert read(mix({"a": "0.5", "b": "0.3", "c": "0.2"}, total=400 * BLOCK), 0, 3000) == whole


def test_weights_change_over_the_run() -> None:
    total = 100 * BLOCK
    mixture = mix({"a": "1 0.5:1 1:0", "b": "0 0.5:0 1:1"}, total)
    found = np.array([number for number, _ in mixture.order(0, total)]).reshape(100, BLOCK).mean(1)
    assert (found[:50] == 0).all() and found[-1] > 0.97
    assert np.abs(found[50:] - np.linspace(0, 1, 51)[:-1]).max() < 0.02
    assert mixture.describe(total)[0].startswith("75.")


def test_one_corpus_may_end_where_another_begins() -> None:
    mixture = mix({"a": "1 0.5:1 0.500001:0", "b": "0 0.5:0 0.500001:1"}, 10 * BLOCK)
    numbers = [number for number, _ in mixture.order(0, 10 * BLOCK)]
    assert sum(numbers) == pytest.approx(5 * BLOCK, abs=BLOCK) and numbers[0] == 0 and numbers[-1] == 1


def test_behind_the_end_of_a_run_something_is_read() -> None:
    mixture = mix({"a": "1", "b": "2"}, 10)
    assert len(read(mixture, 5 * BLOCK, 10)) == 10


@pytest.mark.parametrize(
    "text", ["", "a", "-1", "nan", "inf", "0.5 0.2", "0.5 0:1", "0.5 0.7:1 0.6:1", "0.5 1.1:1", "0.5 x:1", "1 0.5:-1"]
)
def test_what_is_no_weight_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^data\.mixture\.web=.* must be a weight, or a weight and then share:weight"):
        DataConfig(sequence_length=8, mixture={"web": text})


def test_mistakes_are_named() -> None:
    words: dict[str, Any] = {"sequence_length": 8, "mixture": {"web": "1"}}
    with pytest.raises(ValueError, match=r"^data\.corpus=else must be left out with data\.mixture"):
        DataConfig(**words, corpus=("else",))
    with pytest.raises(ValueError, match=r"^data\.mixture must leave some corpus a weight above 0"):
        mix({"a": "1 0.5:0", "b": "1 0.5:0"})
