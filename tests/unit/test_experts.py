"""Experts: each token's choices computed by its own experts, however unevenly the tokens fall."""

import pytest
import torch
from small_models import check_gradients
from torch import Tensor

from model.exchange import lay_out
from model.experts import Experts, SwiGLU, SwiGLUFunction

EXPERTS, HIDDEN, FFN, TOKENS = 5, 4, 3, 13


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_experts() -> Experts:
    experts = Experts(EXPERTS, HIDDEN, FFN).double()
    with torch.no_grad():
        for seed, parameter in enumerate(experts.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed))
    return experts


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up
    return (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


@pytest.mark.parametrize("shape", [(6,), (2, 3, 8)])
def test_swiglu_gradients(shape: tuple[int, ...]) -> None:
    x = random(*shape).requires_grad_()
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(SwiGLUFunction.apply(x), gate * gate.sigmoid() * up, atol=1e-14, rtol=0)
    assert check_gradients(SwiGLUFunction.apply, (x,))


def test_a_dense_network() -> None:
    network, x = SwiGLU(HIDDEN, FFN).double(), random(2, 3, HIDDEN)
    torch.nn.init.normal_(network.gate_up.weight)
    torch.nn.init.normal_(network.down.weight)
    expected = mlp(x, network.gate_up.weight, network.down.weight)
    torch.testing.assert_close(network(x), expected, atol=1e-13, rtol=0)


CHOICES = {
    "random": torch.stack(
        [torch.tensor([t % 5, (3 * t + 1) % 5 if t % 5 != (3 * t + 1) % 5 else (t + 2) % 5]) for t in range(TOKENS)]
    ),
    "all tokens to one expert": torch.full((TOKENS, 1), 3),
    "one expert empty": torch.arange(TOKENS).remainder(4)[:, None],
    "every expert": torch.arange(5).expand(TOKENS, 5),
}


def run(experts: Experts, choices: Tensor, source_of_padding: int | None = None) -> list[Tensor]:
    """Output and gradients of tokens, gates and weights."""
    layout = lay_out(choices.flatten(), torch.arange(choices.numel()) // choices.shape[1], TOKENS, EXPERTS, 4)
    if source_of_padding is not None:
        copies = layout.copies
        other = torch.full_like(copies.source, source_of_padding)
        layout = layout._replace(
            copies=copies._replace(source=other.index_copy(0, copies.slots, copies.source[copies.slots]))
        )
    tokens = random(TOKENS, HIDDEN, seed=7).requires_grad_()
    gates = random(*choices.shape, seed=8).requires_grad_()
    out = experts(tokens, gates.flatten(), layout)
    inputs = (tokens, gates, *experts.parameters())
    return [out, *torch.autograd.grad(out, inputs, random(TOKENS, HIDDEN, seed=9))]


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_every_token_visits_its_own_experts(choices: Tensor) -> None:
    experts = make_experts()
    tokens, gates = random(TOKENS, HIDDEN, seed=7).requires_grad_(), random(*choices.shape, seed=8).requires_grad_()
    gate_up, down = experts.gate_up.weight, experts.down.weight
    rows = []
    for t in range(TOKENS):
        visits = [gates[t, k] * mlp(tokens[t], gate_up[e], down[e]) for k, e in enumerate(choices[t].tolist())]
        rows.append(torch.stack(visits).sum(0))
    expected = torch.stack(rows)
    inputs = (tokens, gates, gate_up, down)
    gradients = torch.autograd.grad(expected, inputs, random(TOKENS, HIDDEN, seed=9))
    for ours, reference in zip(run(experts, choices), (expected, *gradients), strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-12, rtol=0)


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
def test_what_padding_rows_hold_changes_not_a_bit(choices: Tensor) -> None:
    experts = make_experts()
    expected = run(experts, choices)
    for row in (1, TOKENS - 1):
        for ours, reference in zip(run(experts, choices, source_of_padding=row), expected, strict=True):
            assert torch.equal(ours, reference)


def test_an_expert_without_tokens_has_a_zero_gradient() -> None:
    _, _, _, gate_up, down = run(make_experts(), CHOICES["one expert empty"])
    assert not gate_up[4].any() and not down[4].any()
    assert gate_up[:4].flatten(1).any(-1).all() and down[:4].flatten(1).any(-1).all()
