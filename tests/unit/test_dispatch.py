"""Copies that leave for other ranks: one for each rank that a token has experts on, rank by rank, token by token."""

import pytest
import torch
from torch import Tensor

from parallel.exchange import address, copy_out


def choose(tokens: int, experts: int, k: int) -> Tensor:
    """Distinct slots [T, K] for every token."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.rand(tokens, experts, generator=generator).topk(k, dim=-1).indices


CHOICES = {
    "random": choose(13, 12, 3),
    "every expert": choose(5, 12, 12),
    "one rank alone": torch.full((6, 1), 4),
    "one token": choose(1, 12, 2),
    "no token": choose(0, 12, 2),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
@pytest.mark.parametrize("slots", CHOICES.values(), ids=CHOICES)
def test_a_token_is_copied_once_for_each_rank(slots: Tensor, ranks: int) -> None:
    local = 12 // ranks
    sending = address(slots, 12, ranks)
    hosts = [{slot // local for slot in token} for token in slots.tolist()]
    expected = [token for rank in range(ranks) for token, touched in enumerate(hosts) if rank in touched]
    choices = [sum(slot // local == rank for token in slots.tolist() for slot in token) for rank in range(ranks)]
    rows = [sum(rank in touched for touched in hosts) for rank in range(ranks)]
    assert sending.counts.tolist() == [list(pair) for pair in zip(rows, choices, strict=True)]

    source, places, starts = (part.tolist() for part in copy_out(sending.touched, len(expected)))
    assert source == expected
    assert sorted(places) == list(range(len(expected)))
    ends = [*starts, len(places)][1:]
    for token, (start, end) in enumerate(zip(starts, ends, strict=True)):
        assert [source[place] for place in places[start:end]] == [token] * len(hosts[token])
