"""A micro-batch's labels: one token further at each depth, read from the sequence itself."""

import torch

from model.batch import Batch, count_labels, slice_labels


def test_labels_move_one_token_further_at_each_depth() -> None:
    ids = torch.arange(16).view(2, 8)
    counted = ids.remainder(3) > 0
    batch = Batch(ids, counted, None)
    for depth, length in ((0, 7), (1, 6), (2, 5)):
        for d in range(depth + 1):
            labels, counts = slice_labels(batch, depth, d)
            assert labels.tolist() == [[8 * b + 1 + d + t for t in range(length)] for b in range(2)]
            assert torch.equal(counts, labels.remainder(3) > 0)
    # Depth 0 of 1 sees tokens 1..6 and 9..14, of which 3, 6, 9 and 12 do not count; depth 1 sees 2..7 and 10..15.
    assert count_labels(batch, 1) == [8, 8]
    assert count_labels(Batch(ids, torch.ones_like(counted), None), 2) == [10, 10, 10]
