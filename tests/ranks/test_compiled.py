"""Compiled segments on several ranks: the eager numbers, and nothing compiled anew while arrivals vary."""

import warnings
from typing import NamedTuple

import pytest
import torch
from small_models import make_batch, make_config, make_denominators
from spawn import run_ranks
from torch._dynamo.utils import counters

from model.batch import Batch
from model.compile import compile_segments
from model.experts import Experts
from model.precision import Numerics
from model.transformer import Transformer
from parallel.build import build_sharded
from parallel.mesh import Mesh
from parallel.topology import Axis, Topology

CPU = torch.device("cpu")
STEPS, FIRST = 6, 2  # steps, and those that may compile


class Seen(NamedTuple):
    """What a rank saw."""

    apart: float  # the largest difference from eager, relative to the largest entry of each tensor
    graphs: list[int]  # compiled until after each step
    arrivals: set[int]  # rows that the experts got, over steps and layers


def compare(rank: int, world: int, topology: Topology) -> Seen:
    """Both models, the same steps."""
    warnings.simplefilter("ignore")  # torch's compiler warns of its own doings
    mesh, moe = Mesh(topology, CPU), {"experts": 8, "groups": 4}
    config = make_config(num_layers=2, dense_layers=1, attention={"heads": 4}, moe=moe)
    eager, compiled = (build_sharded(config, Numerics(torch.float64), 3, mesh)[0] for _ in range(2))
    compile_segments(compiled)
    graphs, apart, arrivals = [], 0.0, set[int]()
    for experts in (module for module in eager.modules() if isinstance(module, Experts)):
        experts.register_forward_pre_hook(lambda module, args: arrivals.add(len(args[0])))
    for step in range(STEPS):
        apart = max(apart, take_step(mesh, eager, compiled, step))
        graphs.append(counters["stats"]["unique_graphs"])
    return Seen(apart, graphs, arrivals)


def take_step(mesh: Mesh, eager: Transformer, compiled: Transformer, step: int) -> float:
    """A forward and backward of both: how far apart losses and gradients are."""
    dp, place = mesh.degree(Axis.dp), mesh.coordinate(Axis.dp)
    config = eager.config
    batch = make_batch(config, sequences=2 * dp, length=16, documents=True, padding=True, seed=step)
    mine = Batch(*(None if part is None else part[2 * place : 2 * place + 2] for part in batch))
    losses = []
    for model in (eager, compiled):
        model.zero_grad()
        losses.append(model(mine, make_denominators(config)))
        losses[-1].total.backward()
    assert torch.equal(losses[0].load, losses[1].load)
    pairs = [(losses[0].total.detach(), losses[1].total.detach())]
    pairs += [(a.grad, b.grad) for a, b in zip(eager.parameters(), compiled.parameters(), strict=True)]
    return max(float((a - b).abs().max() / a.abs().max().clamp(1e-12)) for a, b in pairs)


@pytest.mark.full
@pytest.mark.parametrize("topology", [Topology(dp=2, ep=2), Topology(tp=2, ep=2)], ids=str)
def test_compiled_segments_are_the_eager_ones(topology: Topology) -> None:
    for seen in run_ranks(compare, topology.world, topology):
        assert seen.apart < 1e-12, seen
        assert seen.graphs[0] and len(set(seen.graphs[FIRST - 1 :])) == 1, seen
        assert len(seen.arrivals) > 2, "every step was like the others"
