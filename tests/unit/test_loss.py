"""Chunked cross entropy: the plain one's value and gradients, never more than a chunk of logits at once."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_models import check_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import loss
from model.loss import cross_entropy

TOKENS, HIDDEN, VOCAB = 11, 4, 7


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((TOKENS, HIDDEN), generator=generator, dtype=torch.float64)
    weight = torch.randn((VOCAB, HIDDEN), generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    counted = torch.rand(TOKENS, generator=generator) < 0.7
    assert 0 < counted.sum() < TOKENS
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels, counted


@pytest.fixture(params=[1, 3 * VOCAB, TOKENS * VOCAB, 2**25], ids=lambda chunk: f"chunks of {chunk}")
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
def test_value_and_gradients() -> None:
    hidden, weight, labels, counted = inputs()
    expected = (F.cross_entropy(hidden @ weight.t(), labels, reduction="none") * counted).sum()
    total = cross_entropy(hidden, weight, labels, counted)
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(
        torch.autograd.grad(total * 0.3, (hidden, weight)),
        torch.autograd.grad(expected * 0.3, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    assert check_gradients(lambda h, w: cross_entropy(h, w, labels, counted), (hidden, weight))


def test_labels_that_do_not_count_reach_nothing() -> None:
    hidden, weight, labels, counted = inputs()
    total = cross_entropy(hidden, weight, labels, counted)
    other = cross_entropy(hidden, weight, labels.where(counted, 0), counted)
    assert torch.equal(total, other)
    (gradient,) = torch.autograd.grad(total, hidden)
    assert torch.equal(gradient[~counted], torch.zeros_like(gradient[~counted]))
    assert cross_entropy(hidden, weight, labels, torch.zeros_like(counted)) == 0


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels, counted = inputs(torch.float32)
    total = cross_entropy(hidden * 1e4, weight, labels, counted)
    (gradient,) = torch.autograd.grad(total, weight)
    assert total.isfinite() and gradient.isfinite().all()


def test_bfloat16_sums_in_float32() -> None:
    hidden, weight, labels, counted = inputs(torch.bfloat16)
    total = cross_entropy(hidden, weight, labels, counted)
    total.backward()
    assert total.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    expected = F.cross_entropy(hidden.double() @ weight.double().t(), labels, reduction="none") * counted
    torch.testing.assert_close(total.double(), expected.sum(), rtol=0.01, atol=0)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return out


def test_no_tensor_exceeds_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, hidden_size, vocab = 64, 2, 50
    hidden = torch.randn(tokens, hidden_size, requires_grad=True)
    weight = torch.randn(vocab, hidden_size, requires_grad=True)
    labels, counted = torch.arange(tokens) % vocab, torch.ones(tokens, dtype=torch.bool)
    largest = {}
    for chunk in (4 * vocab, tokens * vocab):
        monkeypatch.setattr(loss, "CHUNK", chunk)
        with Largest() as mode:
            cross_entropy(hidden, weight, labels, counted).backward()
        largest[chunk] = mode.numel
    assert largest == {4 * vocab: 4 * vocab, tokens * vocab: tokens * vocab}
