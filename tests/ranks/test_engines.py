"""Engines beside the native one: over every kind of holder they give its norms, its clipping and its weights."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from small_models import make_batch, make_config, make_denominators
from spawn import run_ranks
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.precision import Numerics
from parallel.build import build_sharded
from parallel.config import EngineName
from parallel.mesh import Mesh
from parallel.topology import Axis, Topology
from training.config import OptimizerConfig
from training.engine import Engine, State, Update
from training.engines import build_engine

CPU = torch.device("cpu")
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one depth more": {"mtp": 1},
    "tied, no compression": {"tied": True, "mtp": 2, "attention": {"heads": 4, "q_rank": None}},
}
CLIPPED, FREE = OptimizerConfig(lr=1e-3, clip=0.5), OptimizerConfig(lr=1e-3, clip=1e3, weight_decay=0.3)
SMALL = 1024  # bytes of a bucket: sums take many, and some parameters are larger than one
STEPS = ("fine", "fine", "loss is not a number", "told so", "fine")


class Found(NamedTuple):
    """Largest differences from the native engine, relative to the largest entry of each tensor, or to the norm."""

    masters: float
    norms: float
    factors: float
    applied: list[bool]
    loaded: bool  # the native engine's state, given to a new engine, comes out as it went in
    after: float  # of the masters, a step after that


def name_layout(layout: Any) -> str | None:
    """What a test is called."""
    if not isinstance(layout, Topology):
        return None
    return f"dp{layout.dp} tp{layout.tp} ep{layout.ep}"


def make_engine(kind: EngineName, config: ModelConfig, mesh: Mesh, dtype: torch.dtype, how: OptimizerConfig) -> Engine:
    model, shards = build_sharded(config, Numerics(dtype), 3, mesh)
    return build_engine(kind, {0: model}, shards, mesh, replace(how, bucket_bytes=SMALL), dtype)


def train(engine: Engine, config: ModelConfig, mesh: Mesh, steps: tuple[str, ...], seed: int = 0) -> list[Update]:
    """Two micro-batches a step."""
    updates, dp, place = [], mesh.degree(Axis.dp), mesh.coordinate(Axis.dp)
    for number, what in enumerate(steps):
        engine.begin()
        for micro in range(2):
            key = seed + 2 * number + micro
            batch = make_batch(config, sequences=2 * dp, length=8, documents=True, padding=True, seed=key)
            mine = Batch(*(None if part is None else part[2 * place : 2 * place + 2] for part in batch))
            loss = engine.forward(0, mine, make_denominators(config)).total
            engine.backward(0, loss * float("nan") if what == "loss is not a number" else loss)
        engine.finished(0)
        updates.append(engine.step(1e-3 * (1 + number), finite=what != "told so"))
    return updates


def collect(engine: Engine) -> State:
    """The state of all ranks."""
    state = engine.state()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [chunk._replace(tensor=chunk.tensor.clone()) for chunk in state.chunks])
    return State(state.steps, [chunk for chunks in everyone for chunk in chunks])


def assemble(state: State) -> dict[str, Tensor]:
    """Whole tensors; fails where an element is missing or there twice."""
    whole: dict[str, Tensor] = {}
    for name, shape, offset, tensor in state.chunks:
        into = whole.setdefault(name, torch.full(shape, float("nan"), dtype=tensor.dtype))
        part = into[tuple(slice(first, first + size) for first, size in zip(offset, tensor.shape, strict=True))]
        assert part.isnan().all(), f"{name} is there twice"
        part.copy_(tensor)
    assert not [name for name, tensor in whole.items() if tensor.isnan().any()]
    return whole


def differ(one: State, other: State) -> float:
    """Of masters."""
    ours, theirs = assemble(one), assemble(other)
    assert ours.keys() == theirs.keys()
    masters = [name for name in ours if name.startswith("master/")]
    return max(((ours[name] - theirs[name]).abs().max() / ours[name].abs().max()).item() for name in masters)


def compare(
    rank: int, world: int, kind: EngineName, topology: Topology, model: str, dtype: torch.dtype, how: OptimizerConfig
) -> Found:
    mesh = Mesh(topology, CPU)
    config = make_config(
        **{"attention": {"heads": 4}, "moe": {"experts": 8, "groups": 4, "shared_experts": 1}, **MODELS[model]}
    )
    native, engine = (make_engine(name, config, mesh, dtype, how) for name in (EngineName.native, kind))
    ours, theirs = (train(each, config, mesh, STEPS) for each in (native, engine))
    finite = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.applied]
    masters = differ(collect(native), collect(engine))
    given = collect(native)
    engine = make_engine(kind, config, mesh, dtype, how)
    engine.load(given)
    back = collect(engine)
    before, after = assemble(given), assemble(back)
    loaded = back.steps == given.steps and all(torch.equal(before[name], after[name]) for name in before)
    for each in (native, engine):
        assert len(train(each, config, mesh, ("fine",), seed=99)) == 1
    return Found(
        masters,
        max(abs(a.norm - b.norm) / a.norm for a, b in finite),
        max(abs(a.factor - b.factor) for a, b in finite),
        [update.applied for update in theirs],
        loaded,
        differ(collect(native), collect(engine)),
    )


def compare_all(rank: int, world: int, cases: list[tuple[Any, ...]]) -> list[Found]:
    """Several cases on the same ranks, which load DeepSpeed once."""
    return [compare(rank, world, *case) for case in cases]


def check(cases: list[tuple[Any, ...]], masters: float, norms: float) -> None:
    for reports in run_ranks(compare_all, cases[0][1].world, cases):
        for case, found in zip(cases, reports, strict=True):
            assert found.masters < masters and found.after < masters, (case, found)
            assert found.norms < norms and found.factors < norms, (case, found)
            assert found.applied == [what == "fine" for what in STEPS] and found.loaded, (case, found)


def start(
    rank: int, world: int, topology: Topology, kinds: tuple[EngineName, ...]
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Masters that an engine starts from in bfloat16, and this rank's loss with them."""
    mesh, config = Mesh(topology, CPU), make_config(mtp=1)
    batch = make_batch(config, sequences=2, length=8, seed=rank)
    begun = []
    for kind in kinds:
        engine = make_engine(kind, config, mesh, torch.bfloat16, FREE)
        masters = {name: tensor for name, tensor in assemble(collect(engine)).items() if name.startswith("master/")}
        begun.append((masters, engine.forward(0, batch, make_denominators(config)).total.detach()))
    return begun


ZERO = [pytest.param(kind, marks=pytest.mark.full) for kind in (EngineName.zero1, EngineName.zero2, EngineName.zero3)]


@pytest.mark.parametrize("kind", [EngineName.fsdp2, *ZERO])
def test_engines_start_alike_in_bfloat16(kind: EngineName) -> None:
    """Not a bit apart: masters are what the weights round to, not what was drawn."""
    topology = Topology(dp=2) if kind is EngineName.zero3 else Topology(dp=2, ep=2)
    for (ours, loss), (theirs, other) in run_ranks(start, 2, topology, (EngineName.native, kind)):
        assert ours.keys() == theirs.keys() and torch.equal(loss, other)
        for name, master in ours.items():
            assert master.dtype == torch.float32 and torch.equal(master, theirs[name]), name
            assert name.endswith("router.weight") or torch.equal(master, master.bfloat16().float()), name


FSDP2 = [
    (Topology(dp=2), "one depth more", CLIPPED),
    pytest.param(Topology(tp=2), "tied, no compression", CLIPPED, marks=pytest.mark.full),
    pytest.param(Topology(dp=3), "tied, no compression", FREE, marks=pytest.mark.full),
    pytest.param(Topology(dp=2, tp=2, ep=4), "one depth more", CLIPPED, marks=pytest.mark.full),
]


@pytest.mark.parametrize(("topology", "model", "how"), FSDP2, ids=name_layout)
def test_fsdp2_equals_native(topology: Topology, model: str, how: OptimizerConfig) -> None:
    check([(EngineName.fsdp2, topology, model, torch.float64, how)], masters=1e-9, norms=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "topology", [Topology(dp=2, ep=2), Topology(dp=2, tp=2, ep=2), Topology(dp=4, ep=2)], ids=name_layout
)
def test_fsdp2_equals_native_on_more_layouts(topology: Topology, model: str) -> None:
    check([(EngineName.fsdp2, topology, model, torch.float64, CLIPPED)], masters=1e-9, norms=1e-10)


@pytest.mark.full
def test_deepspeed_equals_native() -> None:
    folded = Topology(dp=2, tp=2, ep=4)
    cases = [
        (EngineName.zero1, folded, "one depth more", torch.float32, CLIPPED),
        (EngineName.zero2, folded, "tied, no compression", torch.float32, CLIPPED),
        (EngineName.zero2, Topology(dp=4, ep=2), "one depth more", torch.float32, FREE),
    ]
    check(cases, masters=1e-5, norms=1e-5)


@pytest.mark.full
def test_zero3_equals_native() -> None:
    check([(EngineName.zero3, Topology(dp=2), "one depth more", torch.float32, CLIPPED)], masters=1e-5, norms=1e-5)


# Micro-batches are added up after ranks, natively before: where a gradient cancels to 1e-6 of its tensor's, AdamW shows
# the rounding of its last digits.
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topology", [Topology(dp=2), Topology(dp=3)], ids=name_layout)
def test_zero3_equals_native_on_more_layouts(topology: Topology, dtype: torch.dtype) -> None:
    cases = [(EngineName.zero3, topology, model, dtype, FREE if model == "plain" else CLIPPED) for model in MODELS]
    loose = 10 if dtype == torch.bfloat16 else 1
    check(cases, masters=2e-5 * loose, norms=1e-5 * loose)


# Two bfloat16 runs differ by a rounding of a weight wherever their masters straddle one.
@pytest.mark.full
@pytest.mark.parametrize("kind", [EngineName.zero1, EngineName.zero2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "topology",
    [Topology(dp=2), Topology(tp=2), Topology(dp=2, ep=2), Topology(dp=2, tp=2, ep=2), Topology(dp=3)],
    ids=name_layout,
)
def test_deepspeed_equals_native_on_more_layouts(topology: Topology, dtype: torch.dtype, kind: EngineName) -> None:
    cases = [(kind, topology, model, dtype, CLIPPED) for model in MODELS]
    loose = 10 if dtype == torch.bfloat16 else 1
    check(cases, masters=1e-5 * loose, norms=1e-5 * loose)
