"""Several corpora as one, each with a share of the sequences that may change over a run.

    weights    "0.7"  or  "0.7 0.8:0.7 1:0.2"     the first, then share of the run : weight, linear between
    block b    about BLOCK positions, in which corpus i has so many, whole ones:

        c_i(b) = floor(sum over blocks before b of BLOCK w_i)       sequences of corpus i before block b
        block b begins at position  sum_i c_i(b)                    and its positions are shuffled among the corpora

Sums of fractions lose nothing to rounding, however small a weight is. The n-th position that corpus i gets is its own
n-th sequence, in its own endless order (training/data/batches.py): so the data cursor stays one integer, and a corpus
is read as often as its share asks for. With weights that change, ``run.steps`` says how fast they do.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from training.data.config import Knots
from training.data.shuffle import permute

BLOCK = 1024
Floats = NDArray[np.float64]


class Sequences(Protocol):
    """An endless order of sequences.

    Attributes:
        sequences: how many there are before one comes again.
    """

    sequence_length: int
    sequences: int

    def read(self, first: int, count: int) -> Batch:
        """Those at positions ``first`` to ``first + count - 1``."""
        ...


class Mixture:
    """A ``Sequences`` of several."""

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[Knots], total: int, seed: int) -> None:
        """``total``: positions of the run, over which weights change."""
        self.parts, self._seed = parts, seed
        self.sequence_length = parts[0].sequence_length
        blocks = np.arange(total // BLOCK + 2)
        shares = weigh(weights, np.minimum(blocks * BLOCK / max(1, total), 1.0))
        before = np.zeros((len(blocks) + 1, len(parts)), np.int64)
        before[1:] = np.floor(np.cumsum(shares * BLOCK, axis=0) + 1e-6)
        self._before, self._starts = before, before.sum(1)
        used = shares.mean(0)
        self.sequences = int(min(part.sequences / share for part, share in zip(parts, used, strict=True) if share))

    def read(self, first: int, count: int) -> Batch:
        """See ``Sequences``."""
        rows = []
        for number, place in self.order(first, count):
            rows.append(self.parts[number].read(place, 1))
        documents = [row.documents for row in rows]
        return Batch(
            torch.cat([row.ids for row in rows]),
            torch.cat([row.counted for row in rows]),
            None if documents[0] is None else torch.cat([each for each in documents if each is not None]),
        )

    def order(self, first: int, count: int) -> list[tuple[int, int]]:
        """Of each position, which corpus it is of, and which of the corpus' own positions it is."""
        positions = np.arange(first, first + count)
        # Whoever fills up a batch behind the end of a run gets the last block once more.
        blocks = np.minimum(np.searchsorted(self._starts, positions, side="right") - 1, len(self._starts) - 2)
        found: list[tuple[int, int]] = []
        for block in np.unique(blocks).tolist():
            before, counts = self._before[block], self._before[block + 1] - self._before[block]
            inside = (positions[blocks == block] - self._starts[block]) % counts.sum()
            places, ends = permute(inside, int(counts.sum()), self._seed, block), np.cumsum(counts)
            numbers = np.searchsorted(ends, places, side="right")
            own = before[numbers] + places - (ends - counts)[numbers]
            found += zip(numbers.tolist(), own.tolist(), strict=True)
        return found

    def describe(self, total: int) -> list[str]:
        """How much of the run each part is, in words."""
        block = min(int(np.searchsorted(self._starts, total)), len(self._starts) - 1)
        taken = self._before[block]
        return [
            f"{count / max(1, taken.sum()):.1%}, {count / part.sequences:.2f} epochs of {part.sequences:,} sequences"
            for count, part in zip(taken.tolist(), self.parts, strict=True)
        ]


def weigh(weights: Sequence[Knots], shares: Floats) -> Floats:
    """Shares of the run [n] -> weights of each corpus there [n, corpora], which sum to one. ValueError if all are 0."""
    columns = [np.interp(shares, [share for share, _ in knots], [w for _, w in knots]) for knots in weights]
    table = np.stack(columns, axis=1)
    if not (table.sum(1) > 0).all():
        raise ValueError("data.mixture must leave some corpus a weight above 0 at every share of the run")
    return table / table.sum(1, keepdims=True)
