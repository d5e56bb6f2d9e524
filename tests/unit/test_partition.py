"""What DeepSpeed owns of a parameter is a flat range, which state needs as rectangles."""

import random

import pytest
import torch

from training.partition import cut_range


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 5), (4, 1), (2, 3, 4), (3, 2, 2, 5)], ids=str)
def test_rectangles_are_the_range(shape: tuple[int, ...]) -> None:
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    generator = random.Random(0)  # noqa: S311 (no secret)
    for _ in range(50):
        start, stop = sorted(generator.choices(range(whole.numel() + 1), k=2))
        found = [
            whole[tuple(slice(first, first + size) for first, size in zip(offset, extent, strict=True))].flatten()
            for offset, extent in cut_range(shape, range(start, stop))
        ]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, stop))
