"""Several tensors in one message arrive as they left, whatever their widths and however few rows there are."""

import pytest
import torch
from spawn import run_ranks
from torch import Tensor

from parallel.collectives import all_to_all_joined
from parallel.mesh import Mesh
from parallel.topology import Axis, Topology
from parallel.traffic import Traffic


def make(rank: int) -> list[Tensor]:
    """Three rows of a rank: of an odd number of bytes that no other dtype divides, of floats, and of indices."""
    rows = torch.arange(3)[:, None] + 10 * rank
    return [
        (rows + torch.arange(3)).bfloat16(),
        (rows + torch.arange(2) / 8).float(),
        (rows * torch.ones(2)).int(),
    ]


def send(rank: int, world: int, counts: list[list[int]]) -> list[Tensor]:
    """Rank r sends its last rows, ``counts[r][i]`` of them to rank i."""
    group = Mesh(Topology(dp=2, ep=2), torch.device("cpu")).group(Axis.ep, Traffic.tokens)
    sent, received = counts[rank], [row[rank] for row in counts]
    source = torch.arange(3)[3 - sum(sent) :]
    return all_to_all_joined(make(rank), source, sent, received, group).wait()


@pytest.mark.parametrize("counts", [[[1, 2], [2, 1]], [[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]])
def test_what_is_sent_together_arrives_apart(counts: list[list[int]]) -> None:
    for rank, arrived in enumerate(run_ranks(send, 2, counts)):
        for number, part in enumerate(arrived):
            expected = []
            for sender in range(2):
                first = 3 - sum(counts[sender]) + sum(counts[sender][:rank])
                expected.append(make(sender)[number][first : first + counts[sender][rank]])
            assert torch.equal(part, torch.cat(expected)) and part.dtype == expected[0].dtype
