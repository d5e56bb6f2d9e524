"""Initial weights: a pure function of (seed, name, leading index), whichever slice of them is drawn."""

import tracemalloc

import pytest
import torch
from small_models import make_config

from model.build import build, draw
from model.transformer import Transformer

CONFIG = make_config(mtp=1)


def parameters(model: Transformer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shape", [(11, 7), (6, 2, 5, 3)], ids=["rows", "experts"])
def test_a_slice_is_drawn_as_it_is_in_the_whole(shape: tuple[int, ...]) -> None:
    name = "layers.1.experts.routed.down.weight" if len(shape) > 2 else "name"
    rest = (slice(None),) * (len(shape) - 1)
    whole = draw(name, shape, (slice(None), *rest), 0.02, seed=3)
    assert whole.shape == shape and whole.dtype == torch.float32
    for rows in (slice(2, 5), slice(shape[0] - 1, shape[0]), slice(0, shape[0], 2), slice(0)):
        assert torch.equal(draw(name, shape, (rows, *rest), 0.02, seed=3), whole[rows])
    columns = (slice(None), *rest[1:], slice(1, 3))
    assert torch.equal(draw(name, shape, columns, 0.02, seed=3), whole[columns])


def test_a_part_of_a_fused_weight_is_drawn_as_it_is_in_the_whole() -> None:
    whole = draw("layers.0.mlp.swiglu.gate_up.weight", (2, 5, 3), (slice(None),) * 3, 1.0, seed=0)
    part = (slice(None), slice(2, 4), slice(None))
    assert torch.equal(draw("layers.0.mlp.swiglu.gate_up.weight", (2, 5, 3), part, 1.0, seed=0), whole[part])
    assert torch.equal(
        draw("layers.0.mlp.swiglu.gate_up.weight", (10, 3), (slice(None),) * 2, 1.0, 0).view(2, 5, 3), whole
    )


def test_a_model_is_made_of_those_draws() -> None:
    whole = parameters(build(CONFIG, torch.float32, "cpu", 5))
    for name, parameter in whole.items():
        if parameter.dim() > 1:
            region = (slice(1, 2), *[slice(None)] * (parameter.dim() - 1))
            assert torch.equal(draw(name, parameter.shape, region, CONFIG.init_std, 5), parameter[region]), name
        else:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
    names = {"layers.1.experts.routed.gate_up.weight": (6, 2, 5, 12), "embedding.weight": (19, 12)}
    assert {name: tuple(whole[name].shape) for name in names} == names


def test_seed_name_and_index_each_matter() -> None:
    all_of_it = (slice(None), slice(None))
    first = draw("name", (2, 64), all_of_it, 1.0, seed=0)
    others = [draw("name", (2, 64), all_of_it, 1.0, seed=1), draw("names", (2, 64), all_of_it, 1.0, seed=0)]
    rows = [*first, *others[0], *others[1]]
    for i, row in enumerate(rows):
        for other in rows[:i]:
            assert abs(float(torch.corrcoef(torch.stack((row, other)))[0, 1])) < 0.5


def test_the_same_model_twice_and_other_layers_untouched_by_depth() -> None:
    first = parameters(build(CONFIG, torch.float32, "cpu", 0))
    again = parameters(build(CONFIG, torch.float32, "cpu", 0))
    deeper = parameters(build(make_config(mtp=1, num_layers=4), torch.float32, "cpu", 0))
    for name, parameter in first.items():
        assert torch.equal(parameter, again[name]) and torch.equal(parameter, deeper[name]), name


def test_a_narrow_model_is_the_float32_model_rounded() -> None:
    single = build(CONFIG, torch.float32, "cpu", 0)
    narrow, double = (parameters(build(CONFIG, dtype, "cpu", 0)) for dtype in (torch.bfloat16, torch.float64))
    for name, parameter in parameters(single).items():
        dtype = torch.float32 if "router" in name else torch.bfloat16
        assert narrow[name].dtype == dtype and torch.equal(narrow[name], parameter.to(dtype)), name
        assert double[name].dtype == torch.float64 and torch.equal(double[name], parameter.double()), name
    for name, bias in build(CONFIG, torch.bfloat16, "cpu", 0).named_buffers():
        assert bias.dtype == torch.float32 and not bias.any(), name


def test_the_distribution_is_normal_with_the_configured_deviation() -> None:
    values = draw("weight", (500, 400), (slice(None), slice(None)), 0.006, seed=1).double() / 0.006
    count = values.numel()
    assert abs(float(values.mean())) < 4 / count**0.5
    assert abs(float(values.std()) - 1) < 4 / (2 * count) ** 0.5
    assert abs(float((values**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    assert abs(float((values[1:] * values[:-1]).mean())) < 4 / count**0.5


def test_ten_rows_of_a_large_embedding_cost_ten_rows() -> None:
    tracemalloc.start()
    rows = draw("embedding.weight", (129280, 7168), (slice(1000, 1010), slice(None)), 0.006, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows.shape == (10, 7168)
    assert peak < 2 * rows.numel() * 4
