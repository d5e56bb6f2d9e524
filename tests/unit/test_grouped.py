"""The grouped product: each expert multiplies its own rows; unused rows and empty experts are zero, never garbage."""

import pytest
import torch
from small_models import check_gradients
from torch import Tensor

from model.grouped import PRODUCTS, grouped_matmul
from model.linear import WeightGradient

ENDS = {
    "every expert": [2, 3, 7],
    "first empty": [0, 4, 7],
    "middle empty": [3, 3, 7],
    "last empty": [3, 7, 7],
    "all to one": [0, 7, 7],
    "unused rows": [1, 3, 4],
    "nobody": [0, 0, 0],
}


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def loop_over_rows(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    flat, rows = weight.flatten(1, -2), []
    for p in range(len(x)):
        expert = next((e for e, end in enumerate(ends) if p < end), None)
        rows.append(x[p] @ flat[expert].t() if expert is not None else torch.zeros_like(flat[0, :, 0]))
    return torch.stack(rows)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("weight", [(3, 4, 5), (3, 2, 4, 5)])
def test_forward_and_gradients(weight: tuple[int, ...], ends: list[int]) -> None:
    x, w, e = random(7, 5), random(*weight), torch.tensor(ends, dtype=torch.int32)
    torch.testing.assert_close(grouped_matmul(x, w, e), loop_over_rows(x, w, ends), atol=1e-13, rtol=0)
    assert check_gradients(lambda x, w: grouped_matmul(x, w, e), (x, w))


def test_unused_rows_matter_to_nothing_even_when_not_finite() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, weight, upstream = random(8, 5).detach(), random(3, 4, 5), random(8, 4).detach()
    x[5:], upstream[5:] = float("nan"), float("inf")
    x.requires_grad_()
    y = grouped_matmul(x, weight, ends)
    y.backward(upstream)
    assert x.grad is not None and weight.grad is not None
    assert torch.equal(y[5:], torch.zeros_like(y[5:]))
    assert torch.equal(x.grad[5:], torch.zeros_like(x.grad[5:]))
    assert weight.grad.isfinite().all() and torch.equal(weight.grad[1], torch.zeros(4, 5, dtype=torch.float64))


def test_a_deferred_weight_gradient_is_the_fused_one() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    x, weight, upstream = random(8, 5), random(3, 2, 4, 5), random(8, 8).detach()
    deferred: list[WeightGradient] = []
    grouped_matmul(x, weight, ends, deferred).backward(upstream)
    assert weight.grad is None and len(deferred) == 1 and deferred[0].weight is weight
    grouped_matmul(x, weight, ends).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(deferred[0].compute(), weight.grad)


@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
def test_the_fused_products_of_gpus_agree_with_the_loop(ends: list[int]) -> None:
    x, w, e = random(7, 8, dtype=torch.float32), random(3, 8, 4, dtype=torch.float32), torch.tensor(ends).int()
    gy = random(7, 4, dtype=torch.float32)
    with torch.no_grad():
        loop, fused = PRODUCTS["cpu"], PRODUCTS["cuda"]
        torch.testing.assert_close(fused.rows(x, w, e), loop.rows(x, w, e))
        torch.testing.assert_close(fused.weights(gy, x, e), loop.weights(gy, x, e))
