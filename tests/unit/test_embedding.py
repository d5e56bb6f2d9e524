"""The embedding: a gather whose gradient adds up what a token's many places contribute."""

import pytest
import torch
from small_models import check_gradients

from model.embedding import EmbeddingFunction


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 1)])
def test_rows_and_gradient(shape: tuple[int, ...]) -> None:
    ids = torch.tensor([3, 0, 3, 1, 3, 0])[: torch.Size(shape).numel()].view(shape)
    weight = torch.randn((5, 4), dtype=torch.float64, requires_grad=True)
    assert torch.equal(EmbeddingFunction.apply(ids, weight), weight[ids])
    assert check_gradients(lambda w: EmbeddingFunction.apply(ids, w), (weight,))


def test_a_frequent_token_loses_nothing_in_bfloat16() -> None:
    # Added one by one in bfloat16, 1 + 1 + ... sticks at 256.
    ids = torch.zeros(3, 400, dtype=torch.int64)
    weight = torch.zeros((2, 4), dtype=torch.bfloat16, requires_grad=True)
    EmbeddingFunction.apply(ids, weight).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[1200.0] * 4, [0.0] * 4]
