"""Exchanges under computation: the same bits as without, and no lane ever reads what it has not waited for."""

import itertools

import pytest
import torch
from overlap_modes import ONE, TWO, Taken, Way, find_differences, take_step
from small_models import make_batch, make_config, make_denominators
from spawn import run_ranks

from model.config import ModelConfig, Recompute
from model.fp8 import DEEPSEEK_V3
from model.precision import Numerics
from parallel.build import build_stages
from parallel.config import OverlapConfig, PipelineConfig, ScheduleName
from parallel.exchange import find_exchanges
from parallel.mesh import Mesh
from parallel.overlap.backlog import Backlog
from parallel.overlap.record import COMM, COMPUTE, Recorder
from parallel.pipeline.action import StageMap
from parallel.pipeline.stages import Pipeline, divide
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.prove import prove

BATCHES = 4
WIDE, EIGHT = Numerics(torch.float32), Numerics(torch.bfloat16, DEEPSEEK_V3)
SPOILT = {
    "the processor does not wait for what has come": (COMPUTE, COMM),
    "sending does not wait for what is computed": (COMM, COMPUTE),
    "unpacking does not wait for what travels": (COMM, "wire"),
}


class Spoilt(Recorder):
    """Lanes one of which does not wait for the other."""

    def __init__(self, lane: str, other: str) -> None:
        super().__init__()
        self.forgets = lane, other

    def _wait(self, lane: str, other: str) -> None:
        if (lane, other.partition(" ")[0]) != self.forgets:
            super()._wait(lane, other)


class Layout:
    """An expert-parallel model of one or two stages on this rank."""

    def __init__(self, world: int, config: ModelConfig, stages: int, numerics: Numerics) -> None:
        mesh = Mesh(Topology(dp=world, ep=world), torch.device("cpu"))
        self.config, self.lanes = config, mesh.lanes
        pipeline = Pipeline(divide(config, stages), StageMap(((0,),) * stages))
        self.stages, _ = build_stages(config, numerics, 0, mesh, pipeline, OverlapConfig())
        self.batches = [make_batch(config, documents=True, seed=10 * mesh.rank + k) for k in range(BATCHES)]

    def cut(self, pieces: int) -> None:
        """From now on tokens go in so many pieces."""
        for exchange in find_exchanges(self.stages.values()).values():
            exchange.pieces = pieces

    def step(self, way: Way, recorder: Recorder | None = None) -> Taken:
        """One step; with ``recorder`` on its lanes."""
        if recorder is None:
            return take_step(self.stages, self.batches, make_denominators(self.config), way, self.lanes)
        exchanges = find_exchanges(self.stages.values()).values()
        before = {exchange: exchange.lanes for exchange in exchanges}
        for exchange in exchanges:
            exchange.lanes = recorder
        with recorder:
            taken = take_step(self.stages, self.batches, make_denominators(self.config), way, recorder)
        for exchange, lanes in before.items():
            exchange.lanes = lanes
        return taken


def compare(rank: int, world: int, config: ModelConfig, stages: int, numerics: Numerics) -> list[tuple[str, list[str]]]:
    """Every way against plain autograd."""
    layout = Layout(world, config, stages, numerics)
    ways = ONE if stages == 1 else TWO
    expected = layout.step(ways["autograd"])
    return [(name, find_differences(expected, layout.step(way))) for name, way in ways.items()]


@pytest.mark.parametrize(
    ("world", "stages", "recompute"),
    [
        (2, 1, Recompute.selective),
        (2, 2, Recompute.none),
        *(
            pytest.param(world, stages, recompute, marks=pytest.mark.full)
            for world, stages, recompute in [
                (2, 1, Recompute.none),
                (2, 2, Recompute.selective),
                *itertools.product((4,), (1, 2), (Recompute.none, Recompute.selective)),
            ]
        ),
    ],
)
def test_all_ways_give_the_same_bits(world: int, stages: int, recompute: Recompute) -> None:
    config = make_config(recompute=recompute, moe={"experts": 8, "groups": 4})
    for differences in run_ranks(compare, world, config, stages, WIDE):
        assert not [way for way, wrong in differences if wrong]


@pytest.mark.parametrize("stages", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("recompute", [Recompute.none, pytest.param(Recompute.selective, marks=pytest.mark.full)])
def test_all_ways_give_the_same_bits_in_fp8(stages: int, recompute: Recompute) -> None:
    config = make_config(recompute=recompute, moe={"experts": 8, "groups": 4})
    for differences in run_ranks(compare, 2, config, stages, EIGHT):
        assert not [way for way, wrong in differences if wrong]


def in_pieces(rank: int, world: int, config: ModelConfig, pieces: int) -> tuple[list[bool], list[float]]:
    """Whether a step in pieces repeats itself to the bit, in every way, and how far it is from one that is whole."""
    layout = Layout(world, config, 1, Numerics(torch.float64))
    whole = layout.step(ONE["autograd"])
    layout.cut(pieces)
    repeats, distances = [], []
    for way in ONE.values():
        one, other = layout.step(way), layout.step(way)
        repeats.append(not find_differences(one, other))
        for name, gradient in whole.gradients.items():
            found = one.gradients[name]
            assert gradient is not None and found is not None
            distances.append(float((found - gradient).abs().max() / gradient.abs().max()))
    return repeats, distances


@pytest.mark.full
@pytest.mark.parametrize("pieces", [2, 3])
def test_pieces_change_nothing_but_the_order_of_sums(pieces: int) -> None:
    config = make_config(moe={"experts": 8, "groups": 4})
    for repeats, distances in run_ranks(in_pieces, 2, config, pieces):
        assert all(repeats) and max(distances) < 1e-12


def record(
    rank: int, world: int, config: ModelConfig, pieces: int, numerics: Numerics
) -> list[tuple[str, int, list[str], list[str]]]:
    """Every way under the recorder."""
    found = []
    for stages, ways in ((1, ONE), (2, TWO)):
        layout = Layout(world, config, stages, numerics)
        layout.cut(pieces)
        for name, way in ways.items():
            recorder = Recorder()
            differences = find_differences(layout.step(way), layout.step(way, recorder))
            found.append((name, recorder.crossings, recorder.hazards, differences))
    return found


@pytest.mark.parametrize(
    ("recompute", "pieces", "numerics"),
    [
        (Recompute.none, 1, WIDE),
        pytest.param(Recompute.selective, 1, WIDE, marks=pytest.mark.full),
        pytest.param(Recompute.none, 2, WIDE, marks=pytest.mark.full),
        pytest.param(Recompute.none, 1, EIGHT, marks=pytest.mark.full),
    ],
)
def test_whatever_one_lane_reads_of_the_other_was_waited_for(
    recompute: Recompute, pieces: int, numerics: Numerics
) -> None:
    config = make_config(recompute=recompute, moe={"experts": 8, "groups": 4})
    for ways in run_ranks(record, 2, config, pieces, numerics):
        for name, crossings, hazards, differences in ways:
            # Two routed layers: each sends twice and has sent back twice, every micro-batch, and reads what came.
            assert crossings >= 2 * 4 * BATCHES, name
            assert not hazards, (name, hazards[:3])
            assert not differences, name


def count_at_waits(rank: int, world: int, schedule: str, experts: bool) -> tuple[int, int]:
    """Of the weight gradients that a runner's step puts off: how many were computed as something was waited for."""
    at_waits, all_of_them = 0, 0
    idle, take = Backlog.idle, Backlog._take

    def count(backlog: Backlog, most: int | None = None) -> None:
        nonlocal at_waits
        before = backlog.count()
        idle(backlog, most)
        at_waits += before - backlog.count()

    def count_all(backlog: Backlog, number: int) -> None:
        nonlocal all_of_them
        all_of_them += number
        take(backlog, number)

    case = Case(
        topology=Topology(dp=world, ep=world),
        model=make_config(moe={"experts": 8, "groups": 4}),
        optimizer=OptimizerConfig(lr=1e-3),
        pipeline=PipelineConfig(schedule=ScheduleName(schedule)),
        overlap=OverlapConfig(experts=experts),
        accumulation=BATCHES,
        steps=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Backlog, "idle", count)
        patch.setattr(Backlog, "_take", count_all)
        assert prove(case, Mesh(case.topology, torch.device("cpu"))).passed
    return at_waits, all_of_them


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b_overlap"])
def test_weight_gradients_are_computed_at_waits(schedule: str) -> None:
    """Most of them: those that the last stretch of the last backward leaves come after it."""
    for at_waits, all_of_them in run_ranks(count_at_waits, 2, schedule, True):
        assert at_waits > all_of_them / 2 > 0
    assert run_ranks(count_at_waits, 2, schedule, False) == [(0, 0)] * 2


def spoil(rank: int, world: int, forgets: tuple[str, str]) -> list[str]:
    layout = Layout(world, make_config(moe={"experts": 8, "groups": 4}), 1, WIDE)
    recorder = Spoilt(*forgets)
    layout.step(ONE["overlapped and filled"], recorder)
    return recorder.hazards


@pytest.mark.parametrize("forgets", SPOILT.values(), ids=SPOILT)
def test_a_wait_that_is_missing_is_found(forgets: tuple[str, str]) -> None:
    for hazards in run_ranks(spoil, 2, forgets):
        assert hazards
