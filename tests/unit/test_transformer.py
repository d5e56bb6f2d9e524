"""The whole model: equal to a forward written out token by token, in the loss and every gradient."""

import itertools

import pytest
import torch
from naive_deepseek import NaiveDeepSeek, angle_speeds, yarn_scale
from small_models import SOFTMAX, YARN, make_batch, make_config, make_denominators, make_model
from torch import Tensor

from model.batch import Batch, Denominators, count_labels
from model.config import RopeConfig
from model.rope import tables
from model.transformer import Transformer

CONFIGS = {
    "V3": make_config(mtp=1),
    "V2": make_config(attention={"q_rank": None}, moe={**SOFTMAX, "shared_experts": 2}),
    "V2 with gates normalised": make_config(moe={**SOFTMAX, "normalize_gates": True, "gate_scale": 1.7}),
    "no shared expert": make_config(moe={"shared_experts": 0, "normalize_gates": False}),
    "one group": make_config(moe={"groups": 1, "top_groups": 1, "top_k": 4}),
    "every expert its own group": make_config(moe={"groups": 6, "top_groups": 3, "top_k": 3}),
    "every expert chosen": make_config(moe={"groups": 1, "top_groups": 1, "top_k": 6, "pad": 1}),
    "a single expert": make_config(moe={"experts": 1, "top_k": 1, "groups": 1, "top_groups": 1}),
    "no dense layer": make_config(dense_layers=0, mtp=2),
    "every layer dense": make_config(dense_layers=3),
    "dense but for prediction": make_config(dense_layers=3, mtp=1),
    "no experts": make_config(moe={"experts": 0}, mtp=1),
    "two depths, tied": make_config(mtp=2, tied=True),
    "tied": make_config(tied=True, num_layers=2),
    "YaRN": make_config(rope=YARN, mtp=1),
    "no auxiliary loss": make_config(moe={"aux_alpha": 0.0}),
    "odd sizes": make_config(
        attention={"heads": 3, "q_rank": 5, "kv_rank": 3, "nope_dim": 1, "rope_dim": 2, "v_dim": 5},
        moe={"experts": 5, "top_k": 3, "groups": 1, "top_groups": 1, "ffn": 3, "pad": 3},
        vocab_size=13,
        hidden=9,
        ffn=7,
    ),
}
# (documents, padding, length): each setting meets every kind of batch at least once over the configurations.
BATCHES = [(False, False, 7), (True, True, 7), (False, True, 5), (True, False, 9)]
CASES = [(name, *batch) for name, batch in zip(CONFIGS, itertools.cycle(BATCHES), strict=False)]
CASES += [("V3", *batch) for batch in BATCHES[1:]] + [("YaRN", True, True, 1)]


def exact_tables(rope: RopeConfig, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The model's float32 tables, checked, without their rounding: 1e-7 would hide what these tests look for."""
    length = yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    angles = positions.double()[:, None] * torch.tensor(angle_speeds(rope, dim), dtype=torch.float64)
    exact = angles.cos() * length, angles.sin() * length
    for rounded, value in zip(tables(rope, dim, positions), exact, strict=True):
        torch.testing.assert_close(rounded.double(), value, atol=3e-6, rtol=0)
    return exact


@pytest.fixture(autouse=True)
def without_rounded_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.flow.tables", exact_tables)


def close(actual: Tensor, expected: Tensor, name: str = "") -> None:
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize(("name", "documents", "padding", "length"), CASES)
def test_loss_and_gradients_equal_the_papers_formulas(name: str, documents: bool, padding: bool, length: int) -> None:
    config = CONFIGS[name]
    model = make_model(config)
    batch = make_batch(config, length=length, documents=documents, padding=padding, seed=length)
    denominators = make_denominators(config)
    losses = model(batch, denominators)
    losses.total.backward()

    weights = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    parameters = {n: weights[n].requires_grad_() for n, _ in model.named_parameters()}
    expected = NaiveDeepSeek(weights, config).losses(batch, denominators)
    gradients = torch.autograd.grad(expected.total, list(parameters.values()), allow_unused=True)

    close(losses.total, expected.total, "total")
    close(losses.sums, expected.sums, "sums")
    close(losses.aux, expected.aux, "aux")
    assert losses.load.tolist() == expected.load.tolist()
    for (parameter, ours), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert ours.grad is not None, parameter
        close(ours.grad, torch.zeros_like(ours) if gradient is None else gradient, parameter)


@pytest.mark.parametrize("name", ["V3", "V2", "YaRN", "two depths, tied"])
def test_logits_equal_the_papers_formulas(name: str) -> None:
    config = CONFIGS[name]
    model = make_model(config)
    tokens = make_batch(config, sequences=1).ids
    weights = {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    logits, _ = NaiveDeepSeek(weights, config).sequence(tokens[0].tolist(), [0] * tokens.shape[1])
    length = len(logits[0])
    close(model.logits(tokens[:, :length])[0], torch.stack(logits[0]))


def split(batch: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    """The same sequences as micro-batches of these sizes."""
    ids, counted = batch.ids.split(sizes), batch.counted.split(sizes)
    documents = [None] * len(sizes) if batch.documents is None else batch.documents.split(sizes)
    return [Batch(*parts) for parts in zip(ids, counted, documents, strict=True)]


def gradients(model: Transformer) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    config = CONFIGS["V3"]
    batch = make_batch(config, sequences=4, documents=True, padding=True)
    tokens = count_labels(batch, config.mtp.depth)
    denominators = Denominators(tuple(map(float, tokens)), 4.0)
    whole = make_model(config)
    expected = whole(batch, denominators)
    expected.total.backward()
    parts = make_model(config)
    losses = [parts(part, denominators) for part in split(batch, (1, 2, 1))]
    for part in losses:
        part.total.backward()
    for field in ("total", "sums", "aux", "load"):
        close(sum(getattr(part, field) for part in losses), getattr(expected, field), field)
    close(expected.total, expected.sums[0] / tokens[0] + 0.3 * expected.sums[1] / tokens[1] + 0.01 * expected.aux / 4)
    for name, gradient in gradients(whole).items():
        close(gradients(parts)[name], gradient, name)


def test_what_padding_holds_changes_no_other_token() -> None:
    config = make_config(moe={"aux_alpha": 0.0}, mtp=1)
    batch = make_batch(config, length=9)
    counted = batch.counted.clone()
    counted[0, 5:] = False  # sequence 0 ends after five tokens
    results = []
    for filling in (0, 18):
        ids = batch.ids.clone()
        ids[0, 5:] = filling
        model = make_model(config)
        losses = model(Batch(ids, counted, None), make_denominators(config))
        losses.total.backward()
        results.append((losses, gradients(model)))
    (zeros, zeros_gradients), (others, others_gradients) = results
    close(zeros.sums, others.sums)
    for name, gradient in zeros_gradients.items():
        close(gradient, others_gradients[name], name)


def test_loads_count_every_token_once_in_the_order_of_the_routers() -> None:
    config = CONFIGS["V3"]
    model = make_model(config)
    batch = make_batch(config, sequences=3)
    load = model(batch, make_denominators(config)).load
    assert load.dtype == torch.int64
    assert load.sum(1).tolist() == [3 * 7 * config.moe.top_k] * 3
    before = [router.bias.clone() for router in model.routers()]
    model.update_biases(load, 0.5)
    assert len(before) == 3
    for bias, router, counts in zip(before, model.routers(), load, strict=True):
        close(router.bias, bias + 0.5 * (counts.double().mean() - counts).sign())


def test_a_tied_head_is_one_parameter_with_both_gradients() -> None:
    model = make_model(CONFIGS["tied"])
    assert [name for name, _ in model.named_parameters() if "head" in name] == []
    assert model.head.weight is model.embedding.weight


def test_bfloat16_stays_close_to_float64() -> None:
    config = CONFIGS["every expert chosen"]  # a choice flipped by rounding would drown it
    batch, denominators = make_batch(config), make_denominators(config)
    wide, narrow = make_model(config), make_model(config, torch.bfloat16)
    wide.load_state_dict(narrow.state_dict())
    expected, losses = wide(batch, denominators), narrow(batch, denominators)
    expected.total.backward()
    losses.total.backward()
    assert losses.total.dtype == losses.sums.dtype == torch.float32
    torch.testing.assert_close(losses.total.double(), expected.total, rtol=0.02, atol=0)
    for name, gradient in gradients(wide).items():
        error = (gradients(narrow)[name] - gradient).norm() / gradient.norm()
        assert error < 0.15, f"{name}: {error}"
