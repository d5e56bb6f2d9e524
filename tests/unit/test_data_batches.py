"""Packing and order: every label once an epoch, and a batch that depends on its position and on nothing else."""

from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from model.batch import Batch, count_labels, slice_labels
from training.data.batches import Batches
from training.data.tokens import ShardWriter, TokenFile

EOS = 999


def write(folder: Path, lengths: list[int], cuts: tuple[int, ...] = ()) -> TokenFile:
    """Documents of ``lengths`` tokens, eos included, numbered through: token i is i unless it is eos."""
    ends = list(accumulate(lengths))
    tokens = np.arange(ends[-1])
    tokens[np.array(ends) - 1] = EOS
    starts = [0, *ends[:-1]]
    shards = []
    for number, (low, high) in enumerate(pairwise([0, *cuts, ends[-1]])):
        writer = ShardWriter(folder / f"train-{number:05}.tokens", np.dtype("<u2"))
        writer.append(tokens[low:high], [start - low for start in starts if low <= start < high])
        shards.append(writer.finish(0, 0))
    return TokenFile(folder, shards, np.dtype("<u2"), EOS)


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """343 tokens in 9 documents over 3 shards."""
    return write(tmp_path, [40, 1, 2, 100, 7, 90, 33, 30, 40], cuts=(100, 201))


def same(left: Batch, right: Batch) -> bool:
    pairs = zip(left, right, strict=True)
    return all(x is y is None or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def test_sequences_overlap_by_their_lookahead(tokens: TokenFile) -> None:
    batch = Batches(tokens, sequence_length=50, lookahead=2, shuffle=False).read(0, 7)
    whole = np.concatenate([tokens.read(0, 343)[0].astype(int), np.full(20, EOS)])
    assert batch.ids.shape == (7, 52) and batch.ids.dtype == torch.int64 and batch.documents is None
    for i in range(7):
        assert batch.ids[i].tolist() == whole[i * 50 : i * 50 + 52].tolist()
        assert batch.counted[i].tolist() == [j > 0 and i * 50 + j < 343 for j in range(52)]


@pytest.mark.parametrize("length", [1, 2, 19, 50, 341, 342, 343, 1000])
def test_every_label_counts_once_an_epoch(tokens: TokenFile, length: int) -> None:
    batches = Batches(tokens, sequence_length=length, lookahead=3, seed=5)
    batch = batches.read(batches.sequences, batches.sequences)  # the second epoch
    assert count_labels(batch, 2)[0] == batches.labels == 342
    ids, counted = slice_labels(batch, 2, 0)
    expected = tokens.read(1, 343)[0].tolist()
    assert sorted(ids[counted].tolist()) == sorted(expected)


def test_deeper_labels_stop_at_the_last_token(tokens: TokenFile) -> None:
    batch = Batches(tokens, sequence_length=342, lookahead=3, shuffle=False).read(0, 1)
    assert count_labels(batch, 2) == [342, 341, 340]


def test_masked_documents_keep_to_themselves(tokens: TokenFile) -> None:
    masked = Batches(tokens, sequence_length=50, lookahead=2, mask_documents=True, shuffle=False).read(0, 7)
    plain = Batches(tokens, sequence_length=50, lookahead=2, shuffle=False).read(0, 7)
    starts = [0, 40, 41, 43, 143, 150, 240, 273, 303]
    number = np.searchsorted(starts, np.arange(343), side="right")
    assert masked.documents is not None and masked.documents.dtype == torch.int32
    assert masked.documents.shape == (7, 50) and torch.equal(masked.ids, plain.ids)
    for i in range(7):
        real = min(50, 343 - i * 50)
        row = masked.documents[i].numpy()
        here = number[i * 50 : i * 50 + real]
        assert np.array_equal(row[:real, None] == row[None, :real], here[:, None] == here[None, :])
        assert not np.isin(row[real:], row[:real]).any(), "padding is nobody's"
        for j in range(1, 52):
            start = i * 50 + j in starts
            assert bool(masked.counted[i, j]) == (bool(plain.counted[i, j]) and not start)


def test_reading_is_a_pure_function_of_position(tokens: TokenFile) -> None:
    batches = Batches(tokens, sequence_length=20, lookahead=2, seed=3, mask_documents=True)
    row = {p: batches.read(p, 1) for p in range(60)}
    again = Batches(tokens, sequence_length=20, lookahead=2, seed=3, mask_documents=True)
    for first, count in ((59, 1), (0, 60), (17, 5), (30, 18)):
        batch = again.read(first, count)
        for i in range(count):
            part = None if batch.documents is None else batch.documents[i : i + 1]
            assert same(Batch(batch.ids[i : i + 1], batch.counted[i : i + 1], part), row[first + i])


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_step_is_the_same_for_any_number_of_ranks(tokens: TokenFile, ranks: int) -> None:
    """Step k's batch is the next stretch of the order, whatever the schedule, however it is dealt out."""
    schedule = [8, 8, 16, 16, 24, 24]
    batches = Batches(tokens, sequence_length=20, seed=1)
    stream = batches.read(0, sum(schedule)).ids
    for before, size in zip([0, *accumulate(schedule)], schedule, strict=False):
        share = size // ranks
        parts = [batches.read(before + rank * share, share).ids for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), stream[before : before + size])


def test_epochs_have_different_orders(tokens: TokenFile) -> None:
    batches = Batches(tokens, sequence_length=20, seed=1)
    n = batches.sequences
    orders = [batches.order(epoch * n, n).tolist() for epoch in range(3)]
    assert n == 18 and all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert batches.order(n - 3, 6).tolist() == orders[0][-3:] + orders[1][:3]
    assert Batches(tokens, sequence_length=20, seed=2).order(0, n).tolist() != orders[0]
    assert Batches(tokens, sequence_length=20, shuffle=False).order(n - 1, 3).tolist() == [n - 1, 0, 1]


def test_far_positions_are_as_good_as_near_ones(tokens: TokenFile) -> None:
    batches = Batches(tokens, sequence_length=20, seed=1)
    assert batches.read(10**15, 4).ids.shape == (4, 21)


def test_one_token_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.corpus"):
        Batches(write(tmp_path, [1]), sequence_length=4)
    assert Batches(write(tmp_path, [2]), sequence_length=4).read(0, 1).counted.tolist() == [[False, True] + [False] * 3]
