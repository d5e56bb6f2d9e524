"""Whole documents packed into sequences: none begins in the middle, none goes on in the next one.

    sequence i   |.. document ..|eos|.. document ..|eos|eos eos eos     as many of them, in their order, as fit; padding

What attends stays inside a document, and padding counts nowhere. A document that is longer than a sequence is cut
where that ends: ``cut`` says how many are. Position p of the run is as in training/data/batches.py.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from training.data.batches import order
from training.data.tokens import Row, split_flags


class WholeDocuments:
    """A ``Sequences`` of whole documents."""

    def __init__(self, tokens: Row, *, sequence_length: int, lookahead: int = 1, seed: int = 0) -> None:
        self.tokens, self.sequence_length, self.lookahead, self.seed = tokens, sequence_length, lookahead, seed
        self._starts = np.append(tokens.starts(), tokens.tokens)
        self._firsts = _pack(self._starts, sequence_length)
        self.sequences = len(self._firsts) - 1
        self.cut = int((np.diff(self._starts) > sequence_length).sum())

    def read(self, first: int, count: int) -> Batch:
        """See ``Sequences``."""
        length, width = self.sequence_length, self.sequence_length + self.lookahead
        ids = np.full((count, width), self.tokens.eos, np.int64)
        counted, begins = np.zeros((count, width), np.bool_), np.zeros((count, width + 1), np.bool_)
        for row, sequence in enumerate(order(first, count, self.sequences, self.seed).tolist()):
            start = int(self._starts[self._firsts[sequence]])
            stop = min(int(self._starts[self._firsts[sequence + 1]]), start + length)
            tokens, firsts = self.tokens.read(start, stop)
            size = len(tokens)
            ids[row, :size], counted[row, :size] = split_flags(tokens)
            begins[row, firsts] = True
            begins[row, size] = True
        counted &= ~begins[:, :width]
        documents = torch.from_numpy(np.cumsum(begins[:, :length], 1, dtype=np.int32))
        return Batch(torch.from_numpy(ids), torch.from_numpy(counted), documents)


def _pack(starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The first document of each sequence, and how many documents there are."""
    firsts, document, count = [], 0, len(starts) - 1
    while document < count:
        firsts.append(document)
        document = max(document + 1, int(np.searchsorted(starts, starts[document] + length, side="right")) - 1)
    return np.array([*firsts, count], np.int64)
