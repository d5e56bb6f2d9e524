"""A block as data: its segments in order are its forward, and its seams hold what is put into them."""

from typing import Any

import pytest
import torch
from small_models import make_batch, make_config, make_denominators, make_model
from torch import Tensor, nn

from model.attention import Context
from model.batch import Losses
from model.block import COMPUTE, Block
from model.build import initialise
from model.exchange import LocalExchange, Shipped
from model.rope import tables
from model.segment import Lane
from model.transformer import Transformer

CONFIG = make_config(mtp=1)


def test_segments_have_the_names_and_lanes_that_runners_rely_on() -> None:
    dense, routed = make_model(CONFIG).layers[:2]
    assert [(s.name, s.lane) for s in dense.segments()] == [("attention", Lane.compute), ("mlp", Lane.compute)]
    assert [(s.name, s.lane, s.waits) for s in routed.segments()] == [
        ("attention", Lane.compute, False),
        ("announce", Lane.comm, False),
        ("dispatch", Lane.comm, False),
        ("shared", Lane.compute, False),
        ("arrive", Lane.comm, True),
        ("experts", Lane.compute, False),
        ("combine", Lane.comm, False),
        ("collect", Lane.comm, True),
        ("merge", Lane.compute, False),
    ]


@pytest.mark.parametrize("layer", [0, 1])
def test_segments_run_one_by_one_are_the_forward(layer: int) -> None:
    block: Block = make_model(CONFIG).layers[layer]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((2, 7, 12), generator=generator, dtype=torch.float64)
    context = Context(*tables(CONFIG.rope, 6, torch.arange(7)))
    entered: list[nn.Module] = []
    for module in block.modules():
        if isinstance(module, COMPUTE):
            module.register_forward_hook(lambda module, args, out: entered.append(module))
    carry: Any = x
    for segment in block.segments():
        carry = segment.module(carry, context)
    once = list(entered)
    out = block(x, context)
    assert torch.equal(carry.x, out.x)
    assert (out.routing is None) == (layer == 0)
    # Compute segments are entered through __call__, so hooks fire, in the forward as well.
    assert len(once) == sum(s.lane is Lane.compute for s in block.segments())
    assert len(set(once)) == len(once) and entered == once + once


def forward_backward(model: Transformer) -> tuple[Losses, list[Tensor]]:
    losses = model(make_batch(CONFIG, documents=True, padding=True), make_denominators(CONFIG))
    losses.total.backward()
    return losses, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def make_with_seams(**seams: Any) -> Transformer:
    model = Transformer(CONFIG, **seams).double()
    initialise(model, 0)
    return model


class Reversed(LocalExchange):
    """An exchange to a rank that holds the tokens in the opposite order, and back."""

    def dispatch(self, tokens: Tensor, gates: Tensor, announced: Tensor) -> tuple[Shipped, ...]:
        return super().dispatch(tokens.flip(0), gates.flip(0), announced.flip(0))

    def collect(self, shipped: Shipped) -> Tensor:
        return super().collect(shipped).flip(0)


def whole_square(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    assert documents is not None
    seen = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    return (q @ k.transpose(-1, -2)).masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    "seams",
    [{"exchange": Reversed(CONFIG.moe.experts, CONFIG.moe.pad)}, {"core": whole_square}],
    ids=["exchange", "core"],
)
def test_a_seam_may_be_filled_with_anything_that_computes_the_same(seams: dict[str, Any]) -> None:
    expected, expected_gradients = forward_backward(make_with_seams())
    losses, gradients = forward_backward(make_with_seams(**seams))
    torch.testing.assert_close(losses.total, expected.total, atol=1e-12, rtol=0)
    assert torch.equal(losses.load, expected.load)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)
