"""Modules in FP8: in a format that rounds nothing they are the plain ones; they keep 8 bits, and quantise once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_models import make_batch, make_config, make_denominators
from torch import Tensor, nn

from model import fp8
from model.build import build, outline
from model.exchange import Layout, lay_out
from model.experts import Experts
from model.fp8 import DEEPSEEK_V3, MXFP8, Format, Quantised, Scaling, dequantise, quantise
from model.fp8_experts import FP8Experts
from model.fp8_linear import FP8Linear, Once
from model.fp8_ops import (
    OPERATORS,
    REFERENCE,
    _fp8_activate,
    _fp8_differentiate,
    _fp8_enter,
    _fp8_multiply,
    _fp8_quantise,
    _fp8_rows,
    _fp8_weights,
)
from model.linear import Linear, WeightGradient
from model.precision import swap

TOKENS, HIDDEN, EXPERTS, CHOICES = 300, 256, 5, 2
EXACT = Format(torch.float64, 448.0)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A format that keeps every bit of a quotient."""
    monkeypatch.setitem(fp8.FORMATS, "cpu", EXACT)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_linear(outputs: tuple[int, ...], sizes: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Linear:
    linear = Linear(HIDDEN, *outputs, sizes=sizes).to(dtype)
    with torch.no_grad():
        linear.weight.copy_(0.1 * random(*linear.weight.shape, seed=1))
    return linear


LINEARS = {
    "one": ((300,), ()),
    "parts between blocks": ((2, 256), ()),
    "parts inside a block": ((2, 100), ()),
    "parts of different sizes": ((160,), (100, 60)),
}


def differentiate(call: Callable[..., Tensor], inputs: list[Tensor], seed: int = 5) -> list[Tensor]:
    """Output and gradients."""
    out = call()
    return [out.detach(), *torch.autograd.grad(out, inputs, random(*out.shape, seed=seed, dtype=out.dtype))]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("outputs", "sizes"), LINEARS.values(), ids=LINEARS)
def test_linear_without_rounding_is_the_plain_one(outputs: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    plain = make_linear(outputs, sizes)
    x = random(2, 130, HIDDEN).requires_grad_()
    linear = FP8Linear(plain, DEEPSEEK_V3)
    assert linear.weight is plain.weight
    inputs = [x, plain.weight]
    for ours, theirs in zip(
        differentiate(lambda: linear(x), inputs), differentiate(lambda: plain(x), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("outputs", "sizes"), LINEARS.values(), ids=LINEARS)
def test_a_fused_weight_is_what_its_parts_would_be(outputs: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """To the bit in forward and weight gradient; input gradients of parts are added once more."""
    plain = make_linear(outputs, sizes, torch.bfloat16)
    parts = plain.weight.detach().flatten(0, -2).split(sizes or outputs[-1])
    x, whole = random(130, HIDDEN, dtype=torch.bfloat16).requires_grad_(), FP8Linear(plain, DEEPSEEK_V3)
    out, gx, gw = differentiate(lambda: whole(x), [x, plain.weight])
    g = random(*out.shape, seed=5, dtype=torch.bfloat16)
    made, sums = [], torch.zeros_like(x)
    for part, gradient in zip(parts, g.split([len(part) for part in parts], dim=1), strict=True):
        alone = Linear(HIDDEN, len(part)).bfloat16()
        alone.weight.data.copy_(part)
        linear = FP8Linear(alone, DEEPSEEK_V3)
        y = linear(x)
        inner, weight = torch.autograd.grad(y, [x, alone.weight], gradient)
        made.append((y.detach(), weight))
        sums += inner
    assert torch.equal(out, torch.cat([y for y, _ in made], 1))
    assert torch.equal(gw.flatten(0, -2), torch.cat([weight for _, weight in made]))
    torch.testing.assert_close(gx, sums, rtol=2**-6, atol=2**-6)


def test_linear_rounds_as_far_as_eight_bits_do() -> None:
    """E4M3 keeps 4 significant bits: an error of some 2.6% a value, averaged by the sums of a product."""
    plain = make_linear((2, 256))
    x = random(2, 130, HIDDEN).requires_grad_()
    linear, inputs = FP8Linear(plain, DEEPSEEK_V3), [x, plain.weight]
    for ours, theirs in zip(
        differentiate(lambda: linear(x), inputs), differentiate(lambda: plain(x), inputs), strict=True
    ):
        assert 0.02 < float((ours - theirs).norm() / theirs.norm()) < 0.06


def make_experts(dtype: torch.dtype = torch.float64, ffn: int = 192) -> Experts:
    experts = Experts(EXPERTS, HIDDEN, ffn).to(dtype)
    with torch.no_grad():
        for seed, parameter in enumerate(experts.parameters()):
            parameter.copy_(0.08 * random(*parameter.shape, seed=seed))
    return experts


def route(tokens: int, open_experts: int = EXPERTS) -> Layout:
    generator = torch.Generator().manual_seed(3)
    choices = [torch.randperm(open_experts, generator=generator)[:CHOICES] for _ in range(tokens)]
    chosen = torch.stack(choices) if choices else torch.zeros(0, CHOICES, dtype=torch.int64)
    return lay_out(chosen.flatten(), torch.arange(tokens).repeat_interleave(CHOICES), tokens, EXPERTS, 32)


EXPERT_CASES = {"all": (TOKENS, EXPERTS), "some empty": (TOKENS, 3), "few tokens": (3, EXPERTS), "none": (0, EXPERTS)}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("ffn", [256, 100])
@pytest.mark.parametrize(("tokens", "used"), EXPERT_CASES.values(), ids=EXPERT_CASES)
def test_experts_without_rounding_are_the_plain_ones(tokens: int, used: int, ffn: int) -> None:
    plain, layout = make_experts(ffn=ffn), route(tokens, used)
    experts = FP8Experts(plain, DEEPSEEK_V3)
    x, gates = random(tokens, HIDDEN).requires_grad_(), random(tokens * CHOICES, seed=2).requires_grad_()
    inputs = [x, gates, *plain.parameters()]
    found = differentiate(lambda: experts(x, gates, layout), inputs)
    for ours, theirs in zip(found, differentiate(lambda: plain(x, gates, layout), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("recipe", [DEEPSEEK_V3, MXFP8])
def test_what_padding_rows_hold_changes_not_a_bit(recipe: fp8.Recipe) -> None:
    plain, layout = make_experts(torch.bfloat16), route(TOKENS)
    experts = FP8Experts(plain, recipe)
    x = random(TOKENS, HIDDEN, dtype=torch.bfloat16).requires_grad_()
    gates = random(TOKENS * CHOICES, seed=2, dtype=torch.float32).requires_grad_()
    inputs = [x, gates, *plain.parameters()]
    expected = differentiate(lambda: experts(x, gates, layout), inputs)
    source, slots, _ = layout.copies
    other = torch.full_like(source, 7).index_copy(0, slots, source[slots])
    moved = layout._replace(copies=layout.copies._replace(source=other))
    assert not torch.equal(source, other)
    for ours, theirs in zip(differentiate(lambda: experts(x, gates, moved), inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


MODULES: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    "linear": lambda: (
        FP8Linear(make_linear((2, 256), dtype=torch.bfloat16), DEEPSEEK_V3),
        (random(2, 130, HIDDEN, dtype=torch.bfloat16).requires_grad_(),),
    ),
    "experts": lambda: (
        FP8Experts(make_experts(torch.bfloat16), DEEPSEEK_V3),
        (
            random(TOKENS, HIDDEN, dtype=torch.bfloat16).requires_grad_(),
            random(TOKENS * CHOICES, seed=2, dtype=torch.float32),
            route(TOKENS),
        ),
    ),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_weight_gradients_that_are_put_off_are_the_same(make: Callable[[], Any]) -> None:
    module, (x, *others) = make()
    weights = list(module.parameters())
    expected = dict(zip(weights, differentiate(lambda: module(x, *others), [x, *weights])[2:], strict=True))
    deferred: list[WeightGradient] = []
    out = module(x, *others, deferred)
    out.backward(random(*out.shape, seed=5, dtype=out.dtype))
    assert all(weight.grad is None for weight in weights)
    assert {id(each.weight) for each in deferred} == {id(weight) for weight in weights}
    assert all(torch.equal(each.compute(), expected[each.weight]) for each in deferred)


@pytest.mark.parametrize(("make", "share"), [(MODULES["linear"], 0.53), (MODULES["experts"], 0.58)], ids=MODULES)
def test_what_is_kept_for_the_backward_has_eight_bits(make: Callable[[], Any], share: float) -> None:
    """Of the bytes of inputs in BF16: a linear's, and of experts tokens and what gate and up made of their rows."""
    module, inputs = make()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1 and not isinstance(tensor, nn.Parameter):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(*inputs)
    plain = inputs[0].nbytes
    if len(inputs) > 1:
        plain += len(inputs[2].copies.source) * 2 * module.gate_up.weight.shape[2] * 2
    assert 0.5 < sum(kept.values()) / plain <= share


def test_readers_of_one_tensor_share_what_was_quantised() -> None:
    once, x = Once(), random(2, 8, HIDDEN, dtype=torch.bfloat16)
    scaling = DEEPSEEK_V3.activations
    first = once(x, scaling)
    assert once(x, scaling) is first and once(x.flatten(0, 1), scaling) is first
    assert once(x, scaling.rounded()) is not first
    assert once(x[:1], scaling) is not first and once(x.unflatten(-1, (2, -1)), scaling) is not first
    again = once(x, scaling)
    x += 1
    changed = once(x, scaling)
    assert changed is not again and torch.equal(dequantise(changed), dequantise(quantise(x.flatten(0, 1), scaling)))
    del x, first, again, changed
    assert not len(once._kept)


def test_a_block_quantises_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of q and kv_a, the kv latent, what attention gives, the tokens of shared and routed experts, what the
    shared make of them; and in the routed, where ``activate`` does it, what gate and up made and what goes on from
    there.
    """
    config = make_config(num_layers=1, dense_layers=0, attention={"q_rank": None})
    model = build(config, torch.bfloat16, "cpu", 0, DEEPSEEK_V3)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    seen: list[Tensor] = []

    def watch(x: Tensor, scaling: Scaling) -> Quantised:
        if x.untyped_storage().data_ptr() not in weights:
            seen.append(x)
        return quantise(x, scaling)

    def enter(tokens: Tensor | Quantised, *args: Any) -> tuple[Quantised, Quantised]:
        assert isinstance(tokens, Quantised), "the shared experts have done it"
        return REFERENCE.enter(tokens, *args)

    monkeypatch.setitem(OPERATORS, "cpu", OPERATORS["cpu"]._replace(quantise=watch, enter=enter))
    batch = make_batch(config)
    model(batch, make_denominators(config))
    assert len(seen) == 5


def test_experts_take_gradients_by_blocks() -> None:
    """The recipe that was published as a failure has to run to fail."""
    recipe = DEEPSEEK_V3._replace(gradients=Scaling((128, 128)))
    plain, layout = make_experts(torch.float32), route(200)
    x = random(200, HIDDEN, dtype=torch.float32).requires_grad_()
    gates = torch.ones(len(layout.copies.slots), requires_grad=True)
    inputs = [x, gates, *plain.parameters()]
    experts = FP8Experts(plain, recipe)
    for ours, theirs in zip(
        differentiate(lambda: experts(x, gates, layout), inputs),
        differentiate(lambda: plain(x, gates, layout), inputs),
        strict=True,
    ):
        assert 0.01 < float((ours - theirs).norm() / theirs.norm()) < 0.12


def test_what_is_swapped_and_what_stays() -> None:
    config = make_config(mtp=1)
    plain, model = (outline(config, torch.bfloat16, recipe=recipe) for recipe in (None, DEEPSEEK_V3))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in model.named_parameters()]
    kinds = {name: type(module) for name, module in model.named_modules()}
    stays = {name for name, kind in kinds.items() if kind is Linear}
    assert stays == {"head", "mtp.0.project"}
    assert all(kinds[name] is FP8Linear for name, m in plain.named_modules() if type(m) is Linear and name not in stays)
    assert all(kinds[name] is FP8Experts for name, m in plain.named_modules() if type(m) is Experts)
    assert {type(m) for n, m in plain.named_modules()} - {Linear, Experts} <= {type(m) for m in model.modules()}
    rounded = {n.split(".", 2)[2] for n, m in model.named_modules() if isinstance(m, FP8Linear)
               and m.recipe.activations.powers}  # fmt: skip
    assert {name.removeprefix("block.") for name in rounded} == {"attention.mla.o", "experts.shared.gate_up"}
    bare = nn.Sequential(nn.Identity())
    swap(bare, DEEPSEEK_V3)
    assert [type(module) for module in bare] == [nn.Identity]


def test_operators_are_what_torch_thinks_they_are() -> None:
    check_fake = partial(
        torch.library.opcheck, test_utils=("test_faketensor",)
    )  # others compare FP8, which torch cannot
    x, w = random(40, HIDDEN, dtype=torch.bfloat16), random(3, 60, HIDDEN, dtype=torch.bfloat16)
    ends = torch.tensor([16, 16, 32], dtype=torch.int32)
    for each in (x, x.t(), w):
        for scaling in (*DEEPSEEK_V3, *MXFP8):
            check_fake(_fp8_quantise, (each, list(scaling.tile), scaling.powers))
    a, b = quantise(x, DEEPSEEK_V3.activations), quantise(w, DEEPSEEK_V3.weights)
    tiles = [1, 128, 128, 128]
    check_fake(_fp8_multiply, ([*a[:2], b[0][0], b[1][0]], tiles, torch.bfloat16))
    check_fake(_fp8_rows, ([*a[:2], *b[:2]], tiles, ends, torch.float32))
    check_fake(_fp8_weights, ([x], [x], [1, 128, 1, 128], [True, False], ends, torch.bfloat16))
    check_fake(_fp8_weights, ([x], list(a[:2]), [1, 128, 1, 128], [True, False], ends, torch.bfloat16))
    copies, share = route(20, 3).copies, random(40, dtype=torch.float32)
    for scaling in (DEEPSEEK_V3.activations, MXFP8.activations):
        tile = list(scaling.tile)
        check_fake(_fp8_enter, ([x[:20]], tile, True, *copies))
        check_fake(_fp8_enter, (list(quantise(x[:20], scaling)[:2]), tile, True, *copies))
        check_fake(_fp8_activate, (x, share, tile, False))
        check_fake(_fp8_differentiate, (x[:, : HIDDEN // 2].contiguous(), *quantise(x, scaling)[:2], share, tile))
