"""Expert rows: every choice of every token has one slot, in its expert's run, and padding never comes back."""

import pytest
import torch
from small_models import check_gradients
from torch import Tensor

from model.exchange import Layout, LocalExchange, Permute, Unpermute, lay_out, permute, unpermute


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def choices(tokens: int, k: int, experts: int) -> Tensor:
    """``k`` different experts a token."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])


CHOICES = {
    "random": choices(13, 2, 5),
    "all experts": choices(4, 5, 5),
    "one token": choices(1, 3, 5),
    "all tokens to one expert": torch.full((9, 1), 3),
    "first and last expert empty": 1 + choices(6, 2, 3),
}


@pytest.mark.parametrize("pad", [1, 4, 32])
@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_every_choice_is_served_exactly_once(experts: Tensor, pad: int) -> None:
    layout = lay_out(experts, 5, pad)
    slots, source, ends = layout.slots.tolist(), layout.source.tolist(), layout.ends.tolist()
    used = [slot for row in slots for slot in row]
    assert len(set(used)) == len(used) == experts.numel()
    starts = [0, *ends[:-1]]
    for t, row in enumerate(experts.tolist()):
        for k, expert in enumerate(row):
            assert starts[expert] <= slots[t][k] < ends[expert]
            assert source[slots[t][k]] == t
    for expert, (start, end) in enumerate(zip(starts, ends, strict=True)):
        count = int((experts == expert).sum())
        assert end - start == -(-count // pad) * pad  # an empty expert has no rows at all
        run = [source[p] for p in range(start, start + count)]
        assert run == sorted(run) and set(range(start, start + count)) <= set(used)
    assert layout.ends.dtype == torch.int32
    assert min(source) >= 0 and max(source) < len(experts)


def test_the_number_of_rows_does_not_depend_on_the_choices() -> None:
    rows = {len(lay_out(torch.full((9, 1), e), 5, 4).source) for e in range(5)}
    rows |= {len(lay_out(torch.arange(9).remainder(5)[:, None], 5, 4).source)}
    assert len(rows) == 1
    # The worst case fits: every expert one row over a multiple of the padding.
    worst = lay_out(torch.arange(5).repeat(5)[:, None], 5, 4)
    assert int(worst.ends[-1]) == 5 * 8 <= len(worst.source)


@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_permute_and_unpermute_values_and_gradients(experts: Tensor) -> None:
    layout = lay_out(experts, 5, 4)
    tokens = random(len(experts), 3).requires_grad_()
    assert torch.equal(permute(tokens, layout), tokens[layout.source])
    # Padding slots never receive a gradient in the model; a random one there must not come back.
    used = torch.zeros(len(layout.source), 1, dtype=torch.float64).index_fill(0, layout.slots.flatten(), 1.0)
    assert check_gradients(lambda x: Permute.apply(x, layout.source, layout.slots) * used, (tokens,))

    rows, gates = random(len(layout.source), 3).requires_grad_(), random(*experts.shape).requires_grad_()
    expected = (rows[layout.slots] * gates[..., None]).sum(1)
    torch.testing.assert_close(unpermute(rows, gates, layout), expected, atol=1e-14, rtol=0)
    assert check_gradients(lambda r, g: Unpermute.apply(r, g, layout.source, layout.slots), (rows, gates))


def with_nan_in_padding(rows: Tensor, layout: Layout) -> Tensor:
    filled = torch.full_like(rows, float("nan"))
    filled[layout.slots.flatten()] = rows[layout.slots.flatten()]
    return filled


def test_padding_rows_never_come_back() -> None:
    layout = lay_out(CHOICES["random"], 5, 4)
    tokens, gates = random(13, 3).requires_grad_(), random(13, 2).requires_grad_()
    rows = with_nan_in_padding(random(len(layout.source), 3), layout).requires_grad_()
    assert rows.isnan().any()
    out = unpermute(rows, gates, layout)
    out.backward(random(13, 3))
    assert out.isfinite().all() and gates.grad is not None and gates.grad.isfinite().all()
    assert rows.grad is not None
    padding = torch.ones(len(layout.source), dtype=torch.bool).index_fill(0, layout.slots.flatten(), False)
    assert torch.equal(rows.grad[padding], torch.zeros_like(rows.grad[padding]))
    permute(tokens, layout).backward(with_nan_in_padding(rows.grad, layout))
    assert tokens.grad is not None and tokens.grad.isfinite().all()


def test_bfloat16_rows_are_weighed_and_summed_in_float32() -> None:
    layout = lay_out(CHOICES["all experts"], 5, 1)
    rows, gates = random(len(layout.source), 64).bfloat16(), random(4, 5).float()
    out = unpermute(rows, gates, layout)
    assert torch.equal(out, (rows.float()[layout.slots] * gates[..., None]).sum(1).bfloat16())


def test_the_local_exchange_moves_nothing() -> None:
    exchange, tokens = LocalExchange(5, 4), random(13, 3)
    received, layout = exchange.dispatch(tokens, CHOICES["random"])
    assert received is tokens
    rows, home = exchange.combine(random(len(layout.source), 3), layout)
    assert home is layout and len(rows) == len(layout.source)
