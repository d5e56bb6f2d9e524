"""Expert rows: every choice of every token has one slot, in its expert's run, and padding never comes back."""

import pytest
import torch
from small_models import check_gradients
from torch import Tensor

from model.exchange import Collect, Copies, Layout, LocalExchange, Permute, Unpermute, lay_out, permute, unpermute


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def choices(tokens: int, k: int, experts: int) -> Tensor:
    """``k`` different experts a token."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(tokens)])


def lay(experts: Tensor, count: int, pad: int) -> Layout:
    """The layout of choices [T, K]."""
    held, k = experts.shape
    return lay_out(experts.flatten(), torch.arange(held).repeat_interleave(k), held, count, pad)


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
    layout = lay(experts, 5, pad)
    slots, source, ends = (
        layout.copies.slots.view_as(experts).tolist(),
        layout.copies.source.tolist(),
        layout.ends.tolist(),
    )
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
    assert layout.copies.starts.tolist() == list(range(0, experts.numel(), experts.shape[1]))
    assert min(source) >= 0 and max(source) < len(experts)


def test_the_number_of_rows_does_not_depend_on_the_choices() -> None:
    rows = {len(lay(torch.full((9, 1), e), 5, 4).copies.source) for e in range(5)}
    rows |= {len(lay(torch.arange(9).remainder(5)[:, None], 5, 4).copies.source)}
    assert len(rows) == 1
    # The worst case fits: every expert one row over a multiple of the padding.
    worst = lay(torch.arange(5).repeat(5)[:, None], 5, 4)
    assert int(worst.ends[-1]) == 5 * 8 <= len(worst.copies.source)


def test_tokens_may_have_different_numbers_of_choices() -> None:
    # Tokens 0, 1 and 3 of 4 have 2, 1 and 3 choices; token 2 has none.
    experts, tokens = torch.tensor([1, 0, 1, 0, 1, 2]), torch.tensor([0, 0, 1, 3, 3, 3])
    copies, ends, _ = lay_out(experts, tokens, 4, 3, 1)
    assert ends.tolist() == [2, 5, 6] and copies.starts.tolist() == [0, 2, 3, 3]
    assert copies.source.tolist() == [0, 3, 0, 1, 3, 3] and copies.slots.tolist() == [2, 0, 3, 1, 4, 5]
    rows, gates = random(6, 3), random(6)
    expected = torch.zeros(4, 3, dtype=torch.float64).index_add(0, tokens, rows[copies.slots] * gates[:, None])
    torch.testing.assert_close(unpermute(rows, gates, copies), expected, atol=1e-14, rtol=0)


def test_no_token_at_all() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    copies, ends, _ = lay_out(none, none, 0, 5, 4)
    tokens, gates = random(0, 3).requires_grad_(), random(0).requires_grad_()
    out = unpermute(permute(tokens, copies), gates, copies)
    assert out.shape == (0, 3) and ends.tolist() == [0] * 5
    out.sum().backward()
    assert tokens.grad is not None and tokens.grad.shape == (0, 3)


@pytest.mark.parametrize("experts", CHOICES.values(), ids=CHOICES)
def test_permute_and_unpermute_values_and_gradients(experts: Tensor) -> None:
    copies = lay(experts, 5, 4).copies
    tokens = random(len(experts), 3).requires_grad_()
    assert torch.equal(permute(tokens, copies), tokens[copies.source])
    # Padding rows never receive a gradient in the model; a random one there must not come back.
    used = torch.zeros(len(copies.source), 1, dtype=torch.float64).index_fill(0, copies.slots, 1.0)
    assert check_gradients(lambda x: Permute.apply(x, *copies) * used, (tokens,))

    rows, gates = random(len(copies.source), 3).requires_grad_(), random(experts.numel()).requires_grad_()
    expected = (rows[copies.slots] * gates[:, None]).unflatten(0, experts.shape).sum(1)
    torch.testing.assert_close(unpermute(rows, gates, copies), expected, atol=1e-14, rtol=0)
    assert check_gradients(lambda r, g: Unpermute.apply(r, g, *copies), (rows, gates))


def test_collected_copies_are_summed() -> None:
    copies = lay(CHOICES["random"], 5, 1).copies
    rows = random(26, 3).requires_grad_()
    expected = rows[copies.slots].unflatten(0, (13, 2)).sum(1)
    torch.testing.assert_close(Collect.apply(rows, *copies), expected, atol=1e-14, rtol=0)
    assert check_gradients(lambda r: Collect.apply(r, *copies), (rows,))


def with_nan_in_padding(rows: Tensor, copies: Copies) -> Tensor:
    filled = torch.full_like(rows, float("nan"))
    filled[copies.slots] = rows[copies.slots]
    return filled


def test_padding_rows_never_come_back() -> None:
    copies = lay(CHOICES["random"], 5, 4).copies
    tokens, gates = random(13, 3).requires_grad_(), random(26).requires_grad_()
    rows = with_nan_in_padding(random(len(copies.source), 3), copies).requires_grad_()
    assert rows.isnan().any()
    out = unpermute(rows, gates, copies)
    out.backward(random(13, 3))
    assert out.isfinite().all() and gates.grad is not None and gates.grad.isfinite().all()
    assert rows.grad is not None
    padding = torch.ones(len(copies.source), dtype=torch.bool).index_fill(0, copies.slots, False)
    assert torch.equal(rows.grad[padding], torch.zeros_like(rows.grad[padding]))
    permute(tokens, copies).backward(with_nan_in_padding(rows.grad, copies))
    assert tokens.grad is not None and tokens.grad.isfinite().all()


def test_bfloat16_rows_are_weighed_by_their_own_dtype_and_summed_in_float32() -> None:
    copies = lay(CHOICES["all experts"], 5, 1).copies
    rows, gates = random(len(copies.source), 64).bfloat16(), random(20).float()
    out = unpermute(rows, gates, copies)
    weighed = rows.float()[copies.slots] * gates.bfloat16().float()[:, None]
    assert torch.equal(out, weighed.unflatten(0, (4, 5)).sum(1).bfloat16())


def test_the_local_exchange_moves_nothing() -> None:
    exchange, tokens, gates = LocalExchange(5, 4), random(13, 3), random(13, 2)
    (shipped,) = exchange.dispatch(tokens, gates, exchange.announce(CHOICES["random"]))
    there, weights, layout = exchange.arrive(shipped)
    assert there is tokens and torch.equal(weights, gates.flatten())
    assert exchange.collect(exchange.combine((tokens, layout))) is tokens
