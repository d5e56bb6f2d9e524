"""The attention core: blocked equals the whole square, forward and backward, with documents and without."""

import pytest
import torch
from small_models import check_gradients
from torch import Tensor

from model import core
from model.core import blocked_attention, fused_attention

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2, 2, 2]], dtype=torch.int32)


HEADS = 6


def random(length: int, width: int, seed: int, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((2, heads, length, width), generator=generator, dtype=torch.float64).requires_grad_()


def inputs(length: int, kv_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and narrower values."""
    return random(length, 4, 0), random(length, 4, 1, kv_heads), random(length, 2, 2, kv_heads)


def whole_square(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
    length = q.shape[2]
    k, v = (torch.stack([part[:, head * part.shape[1] // HEADS] for head in range(HEADS)], dim=1) for part in (k, v))
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if documents is not None:
        seen = (seen & (documents[:, :, None] == documents[:, None, :]))[:, None]
    return torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.fixture(params=[1, 3, 8, 128], ids=lambda block: f"blocks of {block}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BLOCK", request.param)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("attention", [blocked_attention, fused_attention])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.usefixtures("block")
def test_equals_the_whole_square(kv_heads: int, attention: core.Core, documents: Tensor | None) -> None:
    q, k, v = inputs(8, kv_heads)
    out, expected = attention(q, k, v, documents), whole_square(q, k, v, documents)
    torch.testing.assert_close(out, expected, atol=1e-13, rtol=0)
    upstream = random(8, 2, 3).detach()
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    for gradient, reference in zip(ours, torch.autograd.grad(expected, (q, k, v), upstream), strict=True):
        torch.testing.assert_close(gradient, reference, atol=1e-13, rtol=0)


@pytest.mark.parametrize("keep", [0, 2048], ids=["computed again", "kept"])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
@pytest.mark.parametrize("kv_heads", [HEADS, 2])
def test_gradients(kv_heads: int, documents: Tensor | None, keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BLOCK", 3)
    monkeypatch.setattr(core, "KEEP_LENGTH", keep)
    assert check_gradients(lambda q, k, v: blocked_attention(q, k, v, documents), inputs(8, kv_heads))


def run(dtype: torch.dtype, documents: Tensor | None) -> tuple[list[Tensor], int]:
    """Result and gradients, and the number of elements kept for the backward beside the inputs."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs(8))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        out = blocked_attention(q, k, v, documents)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return [out, *gradients], sum(t.numel() for t in kept if t.dim() == 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["one document", "documents"])
def test_probabilities_computed_again_are_the_kept_ones(
    dtype: torch.dtype, documents: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "BLOCK", 3)
    monkeypatch.setattr(core, "KEEP_LENGTH", 8)
    with_kept, size = run(dtype, documents)
    assert size == 2 * HEADS * (3 * 3 + 3 * 6 + 2 * 8)
    monkeypatch.setattr(core, "KEEP_LENGTH", 7)
    again, size = run(dtype, documents)
    assert size == 0
    for first, second in zip(with_kept, again, strict=True):
        assert torch.equal(first, second)


def test_shapes_known_to_the_compiler_are_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BLOCK", 3)
    q, k, v = (t.detach() for t in inputs(8))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(core._forward, (q, k, v, None), test_utils=tests)
    out, kept = core._forward(q, k, v, DOCUMENTS)
    torch.library.opcheck(core._backward, (out, q, k, v, DOCUMENTS, kept), test_utils=tests)
