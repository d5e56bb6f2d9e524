"""Weight gradients put off and computed later are the fused backward's, to the bit."""

import pytest
import torch
from small_models import make_batch, make_config, make_denominators, make_model
from torch import Tensor

from model.experts import GroupedLinear
from model.linear import Linear, WeightGradient
from model.transformer import Transformer

CONFIG = make_config(mtp=1, attention={"q_rank": 7})
BATCHES = [make_batch(CONFIG, documents=True, padding=True, seed=seed) for seed in range(3)]


def gradients(model: Transformer) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def run_fused(dtype: torch.dtype) -> dict[str, Tensor | None]:
    model = make_model(CONFIG, dtype)
    for batch in BATCHES:
        model(batch, make_denominators(CONFIG)).total.backward()
    return gradients(model)


def add(deferred: list[WeightGradient]) -> None:
    for weight, compute in deferred:
        gradient = compute()
        assert gradient.shape == weight.shape
        weight.grad = gradient if weight.grad is None else weight.grad + gradient


def deferrable(model: Transformer) -> set[str]:
    """The large weights: every product's but the head's, which the chunked loss computes."""
    modules = (Linear, GroupedLinear)
    return {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, modules) and name != "head"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("when", ["after each backward", "after the last backward"])
def test_deferred_weight_gradients_are_equal_to_the_bit(dtype: torch.dtype, when: str) -> None:
    expected = run_fused(dtype)
    model = make_model(CONFIG, dtype)
    put_off: list[WeightGradient] = []
    for batch in BATCHES:
        deferred: list[WeightGradient] = []
        model(batch, make_denominators(CONFIG), deferred).total.backward()
        if when == "after each backward":
            add(deferred)
        else:
            put_off += deferred
    add(put_off)
    actual = gradients(model)
    for name, gradient in expected.items():
        assert gradient is not None and torch.equal(actual[name], gradient), name


def test_only_weights_of_products_are_deferred() -> None:
    model = make_model(CONFIG)
    deferred: list[WeightGradient] = []
    model(BATCHES[0], make_denominators(CONFIG), deferred).total.backward()
    fused = make_model(CONFIG)
    fused(BATCHES[0], make_denominators(CONFIG)).total.backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    collected = [names[id(weight)] for weight, _ in deferred]
    assert len(collected) == len(set(collected))
    assert set(collected) == deferrable(model)
    for (name, ours), theirs in zip(gradients(model).items(), gradients(fused).values(), strict=True):
        if name in collected:
            assert ours is None, name
        else:
            assert ours is not None and theirs is not None and torch.equal(ours, theirs), name


def test_collecting_nothing_for_frozen_weights() -> None:
    model = make_model(CONFIG)
    model.layers.requires_grad_(False)
    deferred: list[WeightGradient] = []
    model(BATCHES[0], make_denominators(CONFIG), deferred).total.backward()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {names[id(weight)] for weight, _ in deferred} == {n for n in deferrable(model) if n.startswith("mtp.")}
