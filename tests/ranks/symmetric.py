"""Torch's symmetric-memory operators on processors: their own slow versions, which say what the fast ones compute."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric

from parallel.collective_matmul import gather_fused, gather_joined, scatter_fused, scatter_joined


def register() -> torch.library.Library:
    """They stay for as long as what is returned."""
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU")
    return library


def compare_fused(rank: int, world: int) -> tuple[float, float]:
    """How far the fused way is from the joined one, as it is, and given weights of the other sign."""
    kept, group = register(), dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(rank)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shards, weights = [draw(2, 3, 5), draw(2, 3, 4), draw(2, 3, 2)], [draw(5, 6 + rank), draw(4, 3)]
    wholes, narrow = [draw(2, 3 * world, 5), draw(2, 3 * world, 2)], [draw(5, 6)]
    expected = gather_joined(shards, weights, group) + scatter_joined(wholes, narrow, group)
    right = gather_fused(shards, weights, group) + scatter_fused(wholes, narrow, group)
    wrong = gather_fused(shards, [-weight for weight in weights], group) + scatter_fused(wholes, [-narrow[0]], group)
    apart = [max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)) for found in (right, wrong)]
    assert all(tensor.is_contiguous() for tensor in right)
    into = [torch.empty_like(product) for product in right[3:5]]
    gather_fused(shards, weights, group, into=into)
    assert all(map(torch.equal, into, right[3:5]))
    del kept
    return apart[0], apart[1]
