"""The shuffle is a permutation, the same everywhere, and as uneven as chance and no more."""

from collections import Counter
from itertools import permutations
from math import factorial, sqrt

import numpy as np
import pytest

from training.data.shuffle import permute


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 16, 17, 100, 961, 4097, 99_991])
def test_each_item_once(n: int) -> None:
    placed = permute(np.arange(n), n, seed=3, epoch=1)
    assert np.array_equal(np.sort(placed), np.arange(n))


def test_order_never_changes() -> None:
    """Runs resume by position: these numbers must hold for as long as there are runs to resume."""
    assert permute(np.arange(8), 1000, seed=0, epoch=0).tolist() == [806, 423, 606, 103, 737, 912, 858, 760]
    assert permute(np.arange(4), 10**12, seed=2**63 + 5, epoch=7).tolist() == [
        736586657852,
        394402822736,
        913134470946,
        112336615215,
    ]


def test_an_item_alone_goes_where_it_goes_in_company() -> None:
    together = permute(np.arange(1000), 1000, seed=1, epoch=2)
    assert [permute(np.array([i]), 1000, seed=1, epoch=2)[0] for i in range(0, 1000, 37)] == together[::37].tolist()


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch)) for seed in range(-3, 10) for epoch in range(10)}
    assert len(orders) == 13 * 10


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_every_order_is_as_likely(n: int) -> None:
    orders = factorial(n)
    draws = 12 * orders
    found = Counter(tuple(permute(np.arange(n), n, seed=7, epoch=epoch).tolist()) for epoch in range(draws))
    chi_square = sum((found[order] - 12) ** 2 / 12 for order in permutations(range(n)))
    assert chi_square < (orders - 1) + 4 * sqrt(2 * (orders - 1))


def test_neighbours_are_torn_apart() -> None:
    """Over 200 epochs of a thousand items: places, steps between neighbours and fixed points are those of chance."""
    n, epochs = 1000, 200
    placed = np.stack([permute(np.arange(n), n, seed=11, epoch=epoch) for epoch in range(epochs)])
    cells = np.stack([np.bincount(row // 50, minlength=20) for row in placed[:, :50].T])
    assert cells.sum() == 50 * epochs
    chi_square = float(((cells - epochs / 20) ** 2 / (epochs / 20)).sum())
    freedom = 50 * 19
    assert abs(chi_square - freedom) < 4 * sqrt(2 * freedom)
    x, y = placed[:, :-1].ravel() / n, placed[:, 1:].ravel() / n
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / sqrt(n * epochs)
    fixed = (placed == np.arange(n)).sum()  # one an epoch on average
    assert abs(fixed - epochs) < 4 * sqrt(epochs)
    followed = (placed[:, 1:] == placed[:, :-1] + 1).sum()  # pairs that stay a pair: as often
    assert abs(followed - epochs) < 4 * sqrt(epochs)


def test_too_many_to_list() -> None:
    n = 10**13 + 37
    placed = permute(np.arange(20_000), n, seed=1, epoch=0)
    assert placed.min() >= 0 and placed.max() < n and len(np.unique(placed)) == 20_000
    cells = np.bincount(placed * 100 // n, minlength=100)
    assert float(((cells - 200) ** 2 / 200).sum()) < 99 + 4 * sqrt(2 * 99)
