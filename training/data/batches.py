"""Tokens packed into sequences, in an endless shuffled order: reading is a pure function of a position.

    split        |.. document ..|eos|.. document ..|eos|...                 T tokens
    sequence i   tokens i*S to i*S + S + L,   L = lookahead = 1 + D         i in 0..n-1,  n = ceil((T - 1) / S)

    position p   epoch p // n, sequence permutation[seed, epoch](p % n)     p = sequences consumed before it

Sequences overlap by their lookahead, so each token but the first is the next-token label exactly once an epoch. The
last sequence is padded with ``eos``, which counts nowhere. A step that takes c sequences after k others reads
positions k to k+c-1; whoever reads a part of them gets those rows, so nothing depends on how many ranks there are.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import Batch
from training.data.shuffle import permute
from training.data.tokens import Row, split_flags


class Batches:
    """The sequences of one split.

    Attributes:
        sequences: how many an epoch has.
        labels: how many next-token labels an epoch counts, with no documents masked.
    """

    def __init__(
        self,
        tokens: Row,
        *,
        sequence_length: int,
        lookahead: int = 1,
        seed: int = 0,
        mask_documents: bool = False,
        shuffle: bool = True,
    ) -> None:
        """``lookahead`` is 1 + the depth of multi-token prediction; without ``shuffle``, every epoch is in order.

        Raises:
            ValueError: there are not even two tokens.
        """
        if tokens.tokens < 2:
            raise ValueError(f"data.corpus: {tokens.folder} has a split of {tokens.tokens} tokens, too few to train on")
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.lookahead = lookahead
        self.seed = seed
        self.mask_documents = mask_documents
        self.shuffle = shuffle
        self.labels = tokens.tokens - 1
        self.sequences = -(-self.labels // sequence_length)

    def read(self, first: int, count: int) -> Batch:
        """The sequences at positions ``first`` to ``first + count - 1`` of the endless order: B is ``count``."""
        width = self.sequence_length + self.lookahead
        ids = np.full((count, width), self.tokens.eos, np.int64)
        counted = np.zeros((count, width), np.bool_)
        begins = np.zeros((count, width + 1), np.bool_)  # a document; one column more for a full row's end
        for row, sequence in enumerate(self.order(first, count).tolist()):
            start = sequence * self.sequence_length
            tokens, firsts = self.tokens.read(start, min(start + width, self.tokens.tokens))
            ids[row, : len(tokens)], counted[row, : len(tokens)] = split_flags(tokens)
            counted[row, 0] = False
            begins[row, firsts] = True
            begins[row, len(tokens)] = True  # padding is a document of its own
        documents = None
        if self.mask_documents:
            counted &= ~begins[:, :width]
            documents = torch.from_numpy(np.cumsum(begins[:, : self.sequence_length], 1, dtype=np.int32))
        return Batch(torch.from_numpy(ids), torch.from_numpy(counted), documents)

    def order(self, first: int, count: int) -> NDArray[np.int64]:
        """Which sequence is at each of the positions, [count] int64."""
        if self.shuffle:
            return order(first, count, self.sequences, self.seed)
        return np.arange(first, first + count, dtype=np.int64) % self.sequences


def order(first: int, count: int, sequences: int, seed: int) -> NDArray[np.int64]:
    """Which of so many sequences is at each of the positions, [count] int64."""
    epochs, places = np.divmod(np.arange(first, first + count, dtype=np.int64), sequences)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        places[here] = permute(places[here], sequences, seed, epoch)
    return places
