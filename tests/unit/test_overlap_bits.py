"""Sequential, overlapped, split and recomputed: a step of one process has the same bits however it is run."""

import itertools

import pytest
import torch
from overlap_modes import ONE, TWO, Taken, Way, find_differences, take_step
from small_models import make_batch, make_config, make_denominators, make_model

from model.build import initialise, materialise, outline
from model.config import ModelConfig, Recompute
from model.transformer import Transformer
from parallel.build import share_embedding

BATCHES = 4  # two sum alike in either order


def make_stages(config: ModelConfig, stages: int, dtype: torch.dtype) -> dict[int, Transformer]:
    """The model, or two stages of it, whose norms are random too."""
    if stages == 1:
        return {0: make_model(config, dtype)}
    parts = {}
    for stage, layers in enumerate((range(2), range(2, config.num_layers))):
        parts[stage] = materialise(outline(config, dtype, layers), "cpu")
        for other in parts.values():
            share_embedding(other, parts[stage])
        initialise(parts[stage], 0)
    return parts


def step(config: ModelConfig, ways: dict[str, Way], name: str, dtype: torch.dtype) -> Taken:
    stages = make_stages(config, 1 if ways is ONE else 2, dtype)
    batches = [make_batch(config, documents=True, padding=True, seed=seed) for seed in range(BATCHES)]
    return take_step(stages, batches, make_denominators(config), ways[name])


def check_all(config: ModelConfig, ways: dict[str, Way], first: str, others: list[str], dtype: torch.dtype) -> None:
    expected = step(config, ways, first, dtype)
    assert all(gradient is not None and gradient.any() for gradient in expected.gradients.values())
    for name in others:
        assert not find_differences(expected, step(config, ways, name, dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tied", "mtp"), [*itertools.product([False, True], [0, 2])])
def test_all_ways_give_the_same_bits(tied: bool, mtp: int, dtype: torch.dtype) -> None:
    check_all(make_config(mtp=mtp, tied=tied), ONE, "autograd", [*ONE], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ways_of_two_stages_give_the_same_bits(dtype: torch.dtype) -> None:
    check_all(make_config(), TWO, "autograd", [*TWO], dtype)
    # Both stages have the embedding now: in which order they add to it is the schedule's.
    check_all(make_config(mtp=1, tied=True), TWO, "in turns", ["overlapped", "overlapped and filled"], dtype)


@pytest.mark.parametrize("recompute", [Recompute.selective, Recompute.full])
@pytest.mark.parametrize("ways", [ONE, TWO], ids=["one stage", "two stages"])
def test_recomputation_changes_no_bit_of_any_way(ways: dict[str, Way], recompute: Recompute) -> None:
    expected = step(make_config(), ways, "autograd", torch.float32)
    for name in ways:
        found = step(make_config(recompute=recompute), ways, name, torch.float32)
        assert not find_differences(expected, found), name


def test_a_difference_is_found() -> None:
    """The comparison itself: a micro-batch more, or its gradients in another order, is not the same."""
    config = make_config()
    expected = step(config, ONE, "autograd", torch.float32)
    batches = [make_batch(config, documents=True, padding=True, seed=seed) for seed in reversed(range(BATCHES))]
    turned = take_step(make_stages(config, 1, torch.float32), batches, make_denominators(config), ONE["autograd"])
    assert find_differences(expected, turned)
