"""Compiled segments: a graph per kind of segment, the eager loss, and no compilation where shapes or lists grow."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from small_models import make_batch, make_config, make_denominators, make_model

from model.attention import Cache
from model.build import build
from model.compile import compile_segments
from model.fp8 import DEEPSEEK_V3
from model.linear import WeightGradient
from model.transformer import Transformer

# torch's own tracing: it looks at the .grad of inputs that are no leaves and makes instances of autograd Functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]

CONFIG = make_config(num_layers=5, dense_layers=2)
BATCH = make_batch(CONFIG, documents=True, padding=True)


@pytest.fixture
def compiled() -> Iterator[tuple[Transformer, list[Any]]]:
    """A compiled model, and the graphs that its calls compile: traced for real, executed as they are."""
    graphs: list[Any] = []

    def collect(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = make_model(CONFIG)
    with torch._dynamo.config.patch(recompile_limit=8):
        compile_segments(model, backend=collect)
        yield model, graphs
    torch._dynamo.reset()


def test_layers_of_a_kind_share_a_graph_and_change_no_bit(compiled: tuple[Transformer, list[Any]]) -> None:
    model, graphs = compiled
    eager = make_model(CONFIG)
    for _ in range(2):
        losses, expected = (m(BATCH, make_denominators(CONFIG)) for m in (model, eager))
        losses.total.backward()
        expected.total.backward()
        assert torch.equal(losses.total, expected.total) and torch.equal(losses.load, expected.load)
    for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
    # attention without and with a router, the dense feed-forward part, experts, shared and routed, merge
    assert len(graphs) == 6


@pytest.mark.full
def test_products_in_fp8_are_compiled_around() -> None:
    """They are operators to the compiler: the same bits, in as many graphs."""
    losses = []
    for backend in (None, "aot_eager"):
        model = build(CONFIG, torch.bfloat16, "cpu", 0, DEEPSEEK_V3)
        if backend is not None:
            compile_segments(model, backend=backend)
        made = model(BATCH, make_denominators(CONFIG))
        made.total.backward()
        losses.append([made.total.detach(), *(parameter.grad for parameter in model.parameters())])
    torch._dynamo.reset()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*losses, strict=True))


def test_deferred_gradients_and_generation_stay_eager(compiled: tuple[Transformer, list[Any]]) -> None:
    model, graphs = compiled
    deferred: list[WeightGradient] = []
    model(BATCH, make_denominators(CONFIG), deferred).total.backward()
    cache = Cache()
    with torch.no_grad():
        for token in BATCH.ids.split(1, dim=1):
            model.logits(token, cache)
    assert deferred and cache.length == BATCH.ids.shape[1]
    assert graphs == []
