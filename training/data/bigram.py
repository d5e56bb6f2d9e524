"""The loss of a bigram model: what a model must beat to have learned more than neighbours.

    p(b | a) = (n_ab + alpha) / (n_a + alpha V)        n: counts in the training split,  V: vocabulary

``alpha`` is the power of ten that suits the held-out labels best: the baseline gets every advantage.
"""

import numpy as np
from numpy.typing import NDArray

from training.data.mixture import Sequences
from training.data.tokens import Row, split_flags

LARGEST = 4096  # vocabulary: the table of counts has its square, 128 MB
CHUNK = 1 << 22  # tokens counted at once
ALPHAS = tuple(10.0**power for power in range(-4, 2))

Counts = NDArray[np.int64]  # [V * V]: n_ab at a * V + b


def bigram_loss(
    train: Row, held_out: Sequences, vocab_size: int, sequences: int | None = None, limit: int = 1 << 28
) -> float:
    """Mean cross entropy in nats of a bigram model, over the counted next-token labels of the first ``sequences``
    positions of ``held_out`` (None: a whole epoch). It is fitted to the first ``limit`` tokens of ``train``.

    Raises:
        ValueError: the table of counts would be too large, or there are no labels.
    """
    if vocab_size > LARGEST:
        raise ValueError(
            f"a bigram model of {vocab_size} tokens needs a table of {vocab_size**2:.1e} counts: "
            f"it is computed for vocabularies up to {LARGEST}"
        )
    fitted = count_text(train, vocab_size, limit)
    labels = count_labels(held_out, vocab_size, held_out.sequences if sequences is None else sequences)
    if not labels.any():
        raise ValueError("the held-out text has no labels to take a bigram model's loss of")
    pairs = np.flatnonzero(labels)
    seen, weight = fitted[pairs], labels[pairs]
    total = fitted.reshape(vocab_size, vocab_size).sum(1)[pairs // vocab_size]
    losses = [-float(weight @ np.log((seen + alpha) / (total + alpha * vocab_size)) / weight.sum()) for alpha in ALPHAS]
    return min(losses)


def count_text(tokens: Row, vocab_size: int, limit: int) -> Counts:
    """How often each pair of tokens follow each other in the first ``limit`` tokens, documents run together."""
    counts = np.zeros(vocab_size**2, np.int64)
    stop = min(limit, tokens.tokens)
    for start in range(0, stop - 1, CHUNK):
        ids, _ = split_flags(tokens.read(start, min(start + CHUNK + 1, stop))[0])
        counts += np.bincount(ids[:-1] * vocab_size + ids[1:], minlength=vocab_size**2)
    return counts


def count_labels(batches: Sequences, vocab_size: int, sequences: int) -> Counts:
    """How often each pair (input, counted next-token label) comes up in the first ``sequences`` positions."""
    counts = np.zeros(vocab_size**2, np.int64)
    length = batches.sequence_length
    step = max(1, CHUNK // length)
    for first in range(0, sequences, step):
        batch = batches.read(first, min(step, sequences - first))
        ids, counted = batch.ids.numpy(), batch.counted.numpy()
        pairs = ids[:, :length] * vocab_size + ids[:, 1 : 1 + length]
        counts += np.bincount(pairs[counted[:, 1 : 1 + length]], minlength=vocab_size**2)
    return counts
