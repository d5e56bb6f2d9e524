"""Pieces of any size, some of them empty: sums in rank order, copies to all, by every method."""

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor

from parallel import reduce

UNEVEN = [range(0, 5), range(5, 5), range(5, 12), range(12, 13)]
EVEN = [range(0, 3), range(3, 6), range(6, 9), range(9, 12)]


def draw(rank: int) -> Tensor:
    return torch.randn(13, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def pass_pieces(rank: int, world: int, pieces: list[range], own_method: bool) -> tuple[Tensor, Tensor]:
    """A buffer after a reduction; another after a copy to all."""
    if own_method:
        reduce.sums_itself = lambda group: False
    summed, copied = draw(rank), draw(rank)
    first = reduce.reduce_pieces(summed, pieces, dist.group.WORLD)
    second = reduce.gather_pieces(copied, pieces, dist.group.WORLD)
    first()
    second()
    return summed, copied


@pytest.mark.parametrize(("pieces", "own_method"), [(UNEVEN, False), (EVEN, False), (EVEN, True)])
def test_sums_and_copies(pieces: list[range], own_method: bool) -> None:
    ranks = run_ranks(pass_pieces, 4, pieces, own_method)
    expected = draw(0) + draw(1) + draw(2) + draw(3)
    for rank, (summed, copied) in enumerate(ranks):
        for place, piece in enumerate(pieces):
            here = slice(piece.start, piece.stop)
            assert torch.equal(copied[here], draw(place)[here])
            if place == rank and own_method:
                torch.testing.assert_close(summed[here], expected[here])
            elif place == rank:
                assert torch.equal(summed[here], expected[here])
            elif not own_method:
                assert torch.equal(summed[here], draw(rank)[here])


def pass_alone(rank: int, world: int) -> bool:
    buffer = draw(0)
    reduce.reduce_pieces(buffer, [range(13)], dist.group.WORLD)()
    reduce.gather_pieces(buffer, [range(13)], dist.group.WORLD)()
    return torch.equal(buffer, draw(0))


def test_a_rank_alone_sends_nothing() -> None:
    assert run_ranks(pass_alone, 1) == [True]
