"""Operators as torch takes them to be: results are tensors of their own, and calling one loads no compiler."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_mesh import alone
from small_models import make_batch, make_config, make_denominators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import product
from model.build import build
from model.fp8 import DEEPSEEK_V3
from model.operator import operator
from parallel import tensor as tp
from parallel.config import TensorOverlap
from parallel.mesh import Axis, Traffic

OURS = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("shoestring")}


class Watched(TorchDispatchMode):
    """Which of our operators were called; fails where one gives back memory that it was given, or any memory twice."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace.startswith("shoestring"):
            self.seen.add(func._schema.name)
            places = [place(each) for each in tree_leaves(made) if isinstance(each, Tensor) and each.numel()]
            assert len(places) == len(set(places)), f"{func}: two results are one"
            given = {place(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
            assert given.isdisjoint(places), f"{func}: a result is what it was given"
        return made


def place(of: Tensor) -> int:
    return of.untyped_storage().data_ptr()


def train_models() -> None:
    """A forward and a backward: in BF16 as a processor without units for it does them, and in FP8."""
    config = make_config()
    batch = make_batch(config, documents=True)
    for recipe in (None, DEEPSEEK_V3):
        model = build(config, torch.bfloat16, "cpu", 0, recipe)
        losses = model(batch, make_denominators(config))
        losses.total.backward()


def communicate() -> None:
    """What tensor parallelism calls, on one rank: there it would be easiest to give back what came in.

    Of one tensor: the wholes of several would be parts of one there, where no run calls these.
    """
    group = alone().group(Axis.tp, Traffic.tensor).group_name
    shards, weights = [torch.randn(2, 3, 4)], [torch.randn(4, 6)]
    products, filled = [torch.empty(2, 3, 6)], torch.zeros((), dtype=torch.bool)
    tp._gather(shards, group)
    tp._scatter(shards, group)
    tp._total(torch.ones(3), group)
    for how in (TensorOverlap.joined, TensorOverlap.blocks):
        tp._gather_multiply(shards, weights, group, how)
        tp._multiply_scatter(shards, weights, group, how)
    wholes = tp._gather_and_fill(shards, weights, products, filled, group, TensorOverlap.blocks)
    tp._fill(wholes, weights, products, filled)


def test_results_are_tensors_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "HAS_UNITS", False)
    with Watched() as watched:
        train_models()
        communicate()
    assert watched.seen == OURS


def test_what_is_given_back_is_seen() -> None:
    """By the test above, should a kernel do so."""

    @operator("shoestring_test::same")
    def same(x: Tensor) -> Tensor:
        return x

    @operator("shoestring_test::twice")
    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.clone()
        return y, y[:1]

    def check(kernel: Callable[[Tensor], Any], said: str) -> None:
        with Watched(), pytest.raises(AssertionError, match=said):
            kernel(torch.ones(2))

    check(same, "what it was given")
    check(twice, "two results")


def test_kernels_record_nothing_for_autograd() -> None:
    """They write into parts of results, which autograd would refuse, also where a closure runs outside of a graph; and
    without a formula of its own none is taken for a constant."""

    @operator("shoestring_test::into")
    def into(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        torch.mul(x, 2, out=y)
        return y

    made = into(torch.ones(2, requires_grad=True))
    assert made.tolist() == [2, 2]
    with pytest.raises(RuntimeError, match="shoestring_test::into has no gradient of its own"):
        made.sum().backward()


def test_a_run_that_compiles_nothing_loads_no_compiler(text: Path) -> None:
    """It is as large as the rest of torch, and every rank of every start would read its thousand files."""
    words = ["train", "run.steps=2", f"data.corpus=[{text / 'text.txt'}]", "verify=skip", "precision=fp32"]
    small = ["model.num_layers=2", "model.hidden=32", "model.ffn=48", "model.moe.ffn=16", "run.eval_tokens=256"]
    code = f"""
import sys
from launcher.cli import main
assert main({[*words, *small]}) == 0
print(*sorted({{"torch._dynamo", "torch._inductor"}} & set(sys.modules)), file=sys.stderr)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=text, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr.strip(), run.stdout + run.stderr
