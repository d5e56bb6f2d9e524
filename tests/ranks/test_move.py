"""Experts that change ranks between steps: the losses, weights and moments of those that stayed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_models import make_batch, make_config, make_denominators
from spawn import run_ranks
from torch import Tensor

from model.batch import Batch
from model.precision import Numerics
from parallel.build import build_sharded
from parallel.exchange import find_exchanges
from parallel.mesh import Mesh
from parallel.placement import Shard
from parallel.topology import Axis, Topology
from training.config import MomentDtype, OptimizerConfig
from training.move import move_experts
from training.native import Native

CONFIG = make_config(moe={"experts": 8, "groups": 4}, mtp=1)
CPU = torch.device("cpu")


def train(rank: int, world: int, topology: Topology, moves: int, moments: MomentDtype) -> dict[str, Any]:
    """Four steps, experts moved before the second and, with two ``moves``, before the third as well."""
    mesh = Mesh(topology, CPU)
    model, shards = build_sharded(CONFIG, Numerics(torch.float64), 3, mesh)
    engine = Native({0: model}, shards, mesh, OptimizerConfig(lr=1e-2, moments=moments))
    dp, place = mesh.degree(Axis.dp), mesh.coordinate(Axis.dp)
    generator, updates = torch.Generator().manual_seed(5), []
    for step in range(4):
        if 1 <= step <= moves:
            orders = {name: torch.randperm(8, generator=generator) for name in find_exchanges([model])}
            move_experts({0: model}, shards, engine, orders, mesh)
        batch = make_batch(CONFIG, sequences=2 * dp, length=8, seed=step)
        mine = Batch(*(t if t is None else t[2 * place : 2 * place + 2] for t in batch))
        engine.begin()
        losses = engine.forward(0, mine, make_denominators(CONFIG))
        engine.backward(0, losses.total)
        engine.finished(0)
        updates.append((float(engine.step(1e-2).norm), losses.load))
    return {"updates": updates, "experts": gather_experts(model, shards, engine, world)}


def gather_experts(model: Any, shards: dict[str, Shard], engine: Native, world: int) -> dict[str, Tensor]:
    """Masters and moments of all experts in the order of experts."""
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, engine.state().chunks)
    places = {name: exchange.places for name, exchange in find_exchanges([model]).items()}
    whole: dict[str, Tensor] = {}
    for chunk in (chunk for chunks in everyone for chunk in chunks if ".routed." in chunk.name):
        tensor = whole.setdefault(chunk.name, torch.full(chunk.global_shape, torch.nan, dtype=torch.float64))
        tensor[tuple(slice(a, a + n) for a, n in zip(chunk.offset, chunk.tensor.shape, strict=True))] = (
            chunk.tensor.double()
        )
    return {
        name: tensor[places[name.partition("/")[2].partition(".experts.routed.")[0]]] for name, tensor in whole.items()
    }


REPLICAS, FOLDED = Topology(dp=4, ep=2), Topology(dp=2, tp=2, ep=4)


@pytest.mark.parametrize(
    ("topology", "moments"),
    [
        (REPLICAS, MomentDtype.master),
        (FOLDED, MomentDtype.bf16),
        pytest.param(REPLICAS, MomentDtype.bf16, marks=pytest.mark.full),
        pytest.param(FOLDED, MomentDtype.master, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_moved_experts_train_on_as_if_they_had_stayed(topology: Topology, moments: MomentDtype) -> None:
    stayed, moved = (run_ranks(train, topology.world, topology, moves, moments) for moves in (0, 2))
    for here, there in zip(stayed, moved, strict=True):
        for (norm, load), (other, loads) in zip(here["updates"], there["updates"], strict=True):
            assert other == pytest.approx(norm, rel=1e-12) and torch.equal(load, loads)
        assert here["experts"].keys() == there["experts"].keys()
        for name, tensor in here["experts"].items():
            tolerance = 1e-12 if moments is not MomentDtype.bf16 else 1e-3
            torch.testing.assert_close(there["experts"][name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def check_travel(rank: int, world: int) -> bool:
    """Something did move, and moving back gives every bit back."""
    mesh = Mesh(Topology(dp=world, ep=world), CPU)
    model, shards = build_sharded(CONFIG, Numerics(torch.float64), 3, mesh)
    engine = Native({0: model}, shards, mesh, OptimizerConfig(lr=1e-2))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    reverse = {name: torch.arange(8).flip(0) for name in find_exchanges([model])}
    move_experts({0: model}, shards, engine, reverse, mesh)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == [name for name in before if ".routed." in name]
    move_experts({0: model}, shards, engine, {name: torch.arange(8) for name in reverse}, mesh)
    return all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_experts_that_move_back_are_what_they_were() -> None:
    assert all(run_ranks(check_travel, 4))
