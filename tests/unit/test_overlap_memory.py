"""What a forward leaves alive for its backward: a graph cut into stretches holds no more than one that is whole."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import make_batch, make_config, make_denominators, make_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig, Recompute
from model.transformer import Transformer
from parallel.overlap.cut import Stretch
from parallel.overlap.execute import interleave
from parallel.overlap.program import unroll

CONFIG = make_config(num_layers=6, mtp=1)


class Allocations(TorchDispatchMode):
    """Every storage that an operation makes, by weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = weakref.ref(storage)
        return out

    def alive(self) -> int:
        """Bytes of those that somebody still holds."""
        return sum(storage.nbytes() for ref in self.made.values() if (storage := ref()) is not None)


def hold(config: ModelConfig, forward: Callable[[Transformer], Any]) -> int:
    """Bytes alive after a forward, as long as what it returns is."""
    model = make_model(config, torch.float32)
    with Allocations() as allocations:
        kept = forward(model)
    assert kept is not None
    return allocations.alive()


def plain(model: Transformer) -> Any:
    return model(make_batch(model.config, length=64), make_denominators(model.config)).total


def cut(model: Transformer) -> Any:
    batch, denominators = make_batch(model.config, length=64), make_denominators(model.config)
    return interleave([unroll(model, batch, denominators, None, None)])[0].tape


@pytest.mark.parametrize("recompute", list(Recompute))
def test_cuts_hold_no_more_than_autograd(recompute: Recompute) -> None:
    config = make_config(num_layers=6, mtp=1, recompute=recompute)
    whole, pieces = hold(config, plain), hold(config, cut)
    # An empty slot here and there: a few bytes a cut.
    assert pieces <= 1.01 * whole
    assert whole > 100_000


def test_cuts_that_kept_what_crosses_them_would_hold_more(monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Stretch.leave

    def keep(self: Stretch, carry: Any) -> None:
        leave(self, carry)
        self.kept = carry  # type: ignore[attr-defined]

    whole = hold(CONFIG, plain)
    monkeypatch.setattr(Stretch, "leave", keep)
    assert hold(CONFIG, cut) > 1.03 * whole
