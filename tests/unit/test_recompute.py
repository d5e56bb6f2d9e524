"""Recomputation: the same bits from less memory, whatever the policy, deferred or not."""

from typing import Any

import pytest
import torch
from small_models import make_batch, make_config, make_denominators, make_model
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.batch import Losses
from model.config import ModelConfig, Recompute
from model.linear import WeightGradient
from model.recompute import is_repeated, list_repeated
from model.transformer import Transformer

CONFIG = make_config(mtp=1)


def forward_backward(model: Transformer, deferred: list[WeightGradient] | None) -> tuple[Losses, list[Tensor | None]]:
    losses = model(make_batch(CONFIG, documents=True, padding=True), make_denominators(CONFIG), deferred)
    losses.total.backward()
    for weight, compute in deferred or ():
        weight.grad = compute() if weight.grad is None else weight.grad + compute()
    return losses, [parameter.grad for parameter in model.parameters()]


def make_recomputing(policy: Recompute) -> ModelConfig:
    return make_config(mtp=1, recompute=policy)


@pytest.mark.parametrize("deferred", [False, True], ids=["fused", "deferred"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("policy", [Recompute.selective, Recompute.full])
def test_recomputation_changes_not_a_bit(policy: Recompute, dtype: torch.dtype, deferred: bool) -> None:
    expected, expected_gradients = forward_backward(make_model(CONFIG, dtype), None)
    collected: list[WeightGradient] | None = [] if deferred else None
    losses, gradients = forward_backward(make_model(make_recomputing(policy), dtype), collected)
    assert torch.equal(losses.total, expected.total) and torch.equal(losses.load, expected.load)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        assert ours is not None and reference is not None and torch.equal(ours, reference)


class Allocations(TorchDispatchMode):
    """Remembers every storage that an operation makes, without keeping it alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes made and not freed."""
        return sum(size for storage, size in self.sizes.items() if not storage.expired())


def kept_bytes(policy: Recompute) -> int:
    """Bytes that a forward keeps for its backward."""
    model, batch = make_model(make_recomputing(policy)), make_batch(CONFIG, length=32)
    with Allocations() as allocations:
        losses = model(batch, make_denominators(CONFIG))
    kept = allocations.alive()
    assert losses.total.requires_grad  # still alive here
    return kept


def test_recomputation_keeps_less() -> None:
    none, selective, full = (kept_bytes(policy) for policy in (Recompute.none, Recompute.selective, Recompute.full))
    assert full < 0.6 * none and full < selective < 0.8 * none


def test_parts_of_a_product_are_computed_again_as_the_whole_is() -> None:
    """Of 4 heads a rank may have 2: what it widens to them is no more worth keeping."""
    config = make_config(recompute=Recompute.selective, attention={"heads": 4})
    a, sizes = config.attention, list_repeated(config)
    wide = a.heads * (a.nope_dim + a.v_dim)
    assert all(is_repeated((a.kv_rank, wide // parts), sizes) for parts in (1, 2, 4))
    assert not is_repeated((config.hidden, wide), sizes) and not is_repeated((a.kv_rank, wide - 1), sizes)
    assert is_repeated((3, 3), list_repeated(make_recomputing(Recompute.full)))
    assert not is_repeated((a.kv_rank, wide), list_repeated(make_recomputing(Recompute.none)))
