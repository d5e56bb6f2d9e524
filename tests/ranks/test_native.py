"""The native engine on 2 and 4 ranks against one process that adds up everybody's shares in the same order."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_engine import FAULTS, Taken, Toy, contribute, join, join_state, make, take, take_steps
from small_models import make_config
from spawn import run_ranks
from torch import Tensor

from model.precision import Numerics
from parallel.build import build_sharded
from parallel.mesh import Mesh
from parallel.topology import Topology
from training.config import MomentDtype, OptimizerConfig
from training.native import Native

LAYOUTS = {
    "dp2": Topology(dp=2),
    "dp4": Topology(dp=4),
    "dp2 tp2": Topology(dp=2, tp=2),
    "dp2 tp2 ep2": Topology(dp=2, tp=2, ep=2),
    "dp4 ep2": Topology(dp=4, ep=2),
    "tp2": Topology(tp=2),
}
ALONE = Topology()


def run(toy: Toy) -> list[Taken]:
    return run_ranks(take_steps, toy.topology.world, toy)


def alone(toy: Toy) -> Taken:
    """One process that stands for all ranks of ``toy``."""
    return run(replace(toy, topology=ALONE, holders=toy.topology, fault=None))[0]


def make_toy(layout: str, **changes: Any) -> Toy:
    return Toy(LAYOUTS[layout], LAYOUTS[layout], **changes)


def compare(ranks: list[Taken], reference: Taken, tolerance: float) -> None:
    """Norms, clip factors, weights and state; raises AssertionError."""
    for taken in ranks:
        assert taken.updates == ranks[0].updates and taken.count == reference.count
        for ours, theirs in zip(taken.updates, reference.updates, strict=True):
            assert ours.applied == theirs.applied
            if theirs.applied:
                assert math.isclose(ours.norm, theirs.norm, rel_tol=tolerance)
                assert math.isclose(ours.factor, theirs.factor, rel_tol=tolerance)
    assert distance(join(ranks), join([reference])) <= tolerance
    assert distance(join_state(ranks), join_state([reference])) <= tolerance


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference, in units of each tensor's largest entry."""
    assert a.keys() == b.keys()
    return max(float((a[n].double() - b[n].double()).abs().max() / b[n].double().abs().max().clamp(1e-30)) for n in b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(layout: str) -> None:
    toy = make_toy(layout, config={"bucket_bytes": 2000})
    reference = alone(toy)
    assert all(update.factor < 1 for update in reference.updates), "clipping is part of the comparison"
    compare(run(toy), reference, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_one_process_in_narrow_dtypes(dtype: torch.dtype) -> None:
    toy = make_toy("dp2 tp2 ep2", dtype=dtype, config={"moments": MomentDtype.bf16})
    ranks, reference = run(toy), alone(toy)
    compare(ranks, reference, 1e-2 if dtype == torch.bfloat16 else 1e-5)
    state = join_state(ranks)
    assert state["m/up"].dtype == state["v/up"].dtype == torch.bfloat16
    assert state["master/up"].dtype == torch.float32 and join(ranks)["up"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_buckets_do_not_show(dtype: torch.dtype) -> None:
    """Not a bit, without clipping: the norm's order of sums alone follows the pieces."""
    first, *others = (
        run(make_toy("dp4 ep2", dtype=dtype, config={"bucket_bytes": size, "clip": 0.0})) for size in (1, 1000, 2**25)
    )
    for other in others:
        for name, tensor in join(first).items():
            assert torch.equal(tensor, join(other)[name]), name
        for name, tensor in join_state(first).items():
            assert torch.equal(tensor, join_state(other)[name]), name
        norms = ([update.norm for update in ranks[0].updates] for ranks in (first, other))
        assert next(norms) == pytest.approx(next(norms), rel=1e-14 if dtype == torch.float64 else 1e-6)


def count_bytes(rank: int, world: int, topology: Topology) -> tuple[int, float, int]:
    """Bytes of the buffers, what the formula of training/native.py says, elements owned."""
    mesh = Mesh(topology, torch.device("cpu"))
    config = make_config(hidden=64, ffn=160, vocab_size=600, moe={"ffn": 48, "experts": 12})
    model, shards = build_sharded(config, Numerics(torch.bfloat16), 0, mesh)
    formula = 0.0
    for name, parameter in model.named_parameters():
        owned = parameter.numel() / mesh.degree(shards[name].placement.holders)
        formula += (parameter.itemsize + 4) * parameter.numel()
        formula += (12 if parameter.dtype == torch.bfloat16 else 8) * owned
    engine = Native({0: model}, shards, mesh, OptimizerConfig(lr=1.0))
    moments = (chunk.tensor.numel() for chunk in engine.state().chunks if chunk.name.startswith("m/"))
    return engine.count_bytes(), formula, sum(moments)


@pytest.mark.parametrize("layout", ["dp4", "dp2 tp2 ep2"])
def test_bytes_are_those_of_the_formula(layout: str) -> None:
    topology = LAYOUTS[layout]
    counted = run_ranks(count_bytes, topology.world, topology)
    ((whole, _, elements),) = run_ranks(count_bytes, 1, ALONE)
    assert sum(owned for _, _, owned in counted) == elements
    for measured, formula, owned in counted:
        assert measured == pytest.approx(formula, rel=0.03)
        assert owned == pytest.approx(elements / topology.world, rel=0.05)
        assert measured < 0.6 * whole


def test_a_parameter_without_gradient_decays_and_its_moments_move() -> None:
    """A step that gives experts no token must not freeze them."""
    (taken, _), (before, _) = run(make_toy("dp2", steps=3)), run(make_toy("dp2", steps=2))
    reference = alone(make_toy("dp2", steps=3))
    shard, idle = taken.parts["idle"]
    assert shard.shape == (5, 3) and torch.equal(idle, reference.parts["idle"][1])
    torch.testing.assert_close(idle, before.parts["idle"][1] * (1 - 0.03 * 0.3))


@pytest.mark.parametrize("rank", [0, 3])
def test_not_finite_on_one_rank_skips_the_step_on_all(rank: int) -> None:
    toy = make_toy("dp2 tp2", bad=(rank, 1))
    ranks = run(toy)
    assert all([update.applied for update in taken.updates] == [True, False, True] for taken in ranks)
    assert all(taken.count == 2 for taken in ranks)
    # As if that step had not been.
    quiet = alone(replace(toy, bad=(0, 1)))
    assert distance(join(ranks), join([quiet])) <= 1e-12


def go_on(rank: int, world: int, toy: Toy, chunks: list[Any], count: int) -> tuple[Taken, Taken]:
    """Loads a state and takes the last step: what there is after each."""
    from training.engine import State

    mesh = Mesh(toy.topology, torch.device("cpu"))
    module, shards, engine = make(toy, mesh)
    for parameter in module.parameters():
        parameter.detach().fill_(float("nan"))  # to be set from the state
    engine.load(State(count, chunks))
    loaded = take(module, shards, engine, [])
    engine.begin()
    contribute(toy, mesh, module, shards, toy.steps - 1)
    engine.finished(0)
    return loaded, take(module, shards, engine, [engine.step(1e-2 * toy.steps)])


@pytest.mark.parametrize("later", ["dp4", "dp4 ep2", "dp2 tp2 ep2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_state_goes_on_in_the_same_layout_and_in_another(later: str, dtype: torch.dtype) -> None:
    straight = make_toy("dp4 ep2", dtype=dtype)
    stopped = run(replace(straight, steps=2))
    chunks = [chunk for taken in stopped for chunk in taken.chunks]
    toy = replace(straight, topology=LAYOUTS[later], holders=LAYOUTS[later])
    loaded, ranks = zip(*run_ranks(go_on, 4, toy, chunks, 2), strict=True)
    for joined in (join, join_state):
        assert all(torch.equal(tensor, joined(loaded)[name]) for name, tensor in joined(stopped).items())
    assert all(taken.count == 2 for taken in loaded) and all(taken.count == 3 for taken in ranks)
    # Other layouts contribute other shares to the last step.
    if later == "dp4 ep2":
        expected = run(straight)
        assert [taken.updates[-1] for taken in expected] == [taken.updates[0] for taken in ranks]
        assert all(torch.equal(tensor, join(ranks)[name]) for name, tensor in join(expected).items())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(fault: str) -> None:
    toy = make_toy("dp2 tp2 ep2", fault=fault)
    reference = alone(toy)
    compare(run(replace(toy, fault=None)), reference, 1e-12)
    with pytest.raises(AssertionError):
        compare(run(toy), reference, 1e-12)
