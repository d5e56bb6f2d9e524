"""Linear: its two gradients, fused weights, and the weight gradient put off."""

import pytest
import torch
from torch.autograd import gradcheck

from model.linear import Linear, LinearFunction, WeightGradient


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("weight", [(5, 3), (2, 4, 3)])
@pytest.mark.parametrize("leading", [(7,), (2, 4), (1, 1, 1)])
def test_gradients(leading: tuple[int, ...], weight: tuple[int, ...]) -> None:
    assert gradcheck(lambda x, w: LinearFunction.apply(x, w, None), (random(*leading, 3), random(*weight)))


def test_a_fused_weight_keeps_its_parts_apart() -> None:
    linear = Linear(3, 2, 4)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(5, 3)
    gate, up = linear(x).chunk(2, dim=-1)
    torch.testing.assert_close(gate, x @ linear.weight[0].t())
    torch.testing.assert_close(up, x @ linear.weight[1].t())
    assert linear.weight.shape == (2, 4, 3)


def test_a_deferred_weight_gradient_leaves_the_input_gradient_as_it_was() -> None:
    x, weight = random(2, 4, 3), random(2, 5, 3)
    deferred: list[WeightGradient] = []
    upstream = random(2, 4, 10).detach()
    LinearFunction.apply(x, weight, deferred).backward(upstream)
    gx, x.grad = x.grad, None
    assert weight.grad is None and len(deferred) == 1 and deferred[0].weight is weight
    LinearFunction.apply(x, weight, None).backward(upstream)
    assert x.grad is not None and weight.grad is not None
    assert torch.equal(gx, x.grad)
    assert torch.equal(deferred[0].compute(), weight.grad)


def test_inputs_without_gradient_cost_none() -> None:
    x, weight = random(4, 3).detach(), random(5, 3)
    LinearFunction.apply(x, weight, None).sum().backward()
    assert weight.grad is not None and x.grad is None
    frozen, needed = random(5, 3).detach(), random(4, 3)
    deferred: list[WeightGradient] = []
    LinearFunction.apply(needed, frozen, deferred).sum().backward()
    assert needed.grad is not None and deferred == []
