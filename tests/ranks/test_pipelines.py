"""What pipelines keep besides the plain model's numbers: bits over schedules and over copies, and nothing once done."""

import weakref
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from small_models import make_config
from spawn import run_ranks
from torch import Tensor

from model.precision import Numerics
from parallel.build import build_stages
from parallel.config import PipelineConfig
from parallel.mesh import Mesh, Traffic
from parallel.pipeline.action import StageMap
from parallel.pipeline.lower import lower
from parallel.pipeline.plan import schedule_of
from parallel.pipeline.run import WINDOW, Interpreter, Work
from parallel.pipeline.schedules import evaluate
from parallel.pipeline.trace import Span
from parallel.topology import Axis, Topology
from training import pipeline
from training.config import OptimizerConfig
from training.gather import name_tensors
from training.microbatches import count_denominators
from training.native import Native
from training.pipeline import Runner, Training, shape_activations
from training.proof.case import Case, share_batch
from training.proof.steps import take_step

CPU = torch.device("cpu")
PAIR = Topology(pp=2)


class Taken(NamedTuple):
    """What a rank has after the steps of a case."""

    steps: list[tuple[Any, ...]]  # losses, loads, norm: of the whole model
    weights: dict[str, Tensor]


def make_case(schedule: str, topology: Topology = PAIR, microbatches: int = 4, virtual: int = 1, **model: Any) -> Case:
    """Three steps of a model whose stages differ in size."""
    return Case(
        topology=topology,
        model=make_config(num_layers=5, **model),
        optimizer=OptimizerConfig(lr=1e-2, clip=0.3, bucket_bytes=1024),
        pipeline=PipelineConfig(schedule=schedule, virtual=virtual),
        accumulation=microbatches,
    )


def make(case: Case, mesh: Mesh, dtype: torch.dtype) -> tuple[Any, Native, Runner]:
    """The stages of a rank, their engine and their runner."""
    arranged = case.stages
    mesh.share(arranged.shared(case.model))
    stages, shards = build_stages(case.model, Numerics(dtype), case.seed, mesh, arranged, case.overlap)
    runner = Runner(case.parallel, arranged, shape_activations(case.model, case.length, dtype, mesh), mesh)
    return stages, Native(stages, shards, mesh, case.optimizer), runner


def train(rank: int, world: int, cases: list[Case], dtype: torch.dtype) -> list[Taken]:
    """Each case from its first weights on."""
    taken = []
    for case in cases:
        mesh = Mesh(case.topology, CPU)
        stages, engine, runner = make(case, mesh, dtype)
        steps = [take_step(case, mesh, stages, engine, runner, step) for step in range(case.steps)]
        engine.settle()
        rows = [(*step.sums.tolist(), *step.load.flatten().tolist(), step.update.norm) for step in steps]
        taken.append(Taken(rows, {name: tensor.clone() for name, tensor in name_tensors(stages.values()).items()}))
    return taken


@pytest.mark.parametrize("topology", [PAIR, Topology(pp=2, dp=2, ep=2)], ids=["pp2", "pp2 dp2 ep2"])
def test_the_copies_of_dualpipe_stay_the_same_bits(topology: Topology) -> None:
    """Each of two ranks has both stages."""
    cases = [make_case("dualpipe", topology, mtp=1)]
    for dtype in (torch.float32, torch.bfloat16):
        ranks = [taken for (taken,) in run_ranks(train, topology.world, cases, dtype)]
        for one, other in zip(ranks[: topology.stage_size], ranks[topology.stage_size :], strict=True):
            assert one.steps == other.steps and len({loss for loss, *_ in one.steps}) == 3
            assert one.weights.keys() == other.weights.keys() and "norm.weight" in one.weights
            assert all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


SAME = {  # schedules of the same stages on the same ranks
    "a stage each": [("gpipe", 1), ("1f1b", 1), ("zb_h1", 1)],
    "a loop": [("interleaved_1f1b", 2), ("interleaved_1f1b_overlap", 2)],
    "a V": [("zb_v", 1), ("dualpipev", 1)],
}


@pytest.mark.parametrize("alike", SAME)
def test_schedules_of_the_same_stages_give_the_same_bits(alike: str) -> None:
    """Gradients are added in the order of micro-batches, whatever is computed when, at once or later."""
    cases = [make_case(schedule, virtual=virtual, mtp=1, tied=True) for schedule, virtual in SAME[alike]]
    for taken in run_ranks(train, 2, cases, torch.float32):
        for other in taken[1:]:
            assert other.steps == taken[0].steps
            assert all(torch.equal(tensor, other.weights[name]) for name, tensor in taken[0].weights.items())


def watch(rank: int, world: int, case: Case) -> tuple[list[Span], list[int]]:
    """The spans of a step, and how much the interpreter and the work hold when it is over."""
    mesh, works = Mesh(case.topology, CPU), list[Training]()
    _, engine, runner = make(case, mesh, torch.float64)
    batches, spans = share_batch(case, mesh, 0), list[Span]()

    def keep(*args: Any) -> Training:
        works.append(Training(*args))
        return works[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Training", keep)
        assert runner.step(engine, batches, count_denominators(batches, case.model.mtp.depth, mesh), spans=spans)
    interpreter = runner._interpreter
    return spans, [len(held) for held in (interpreter._held, interpreter._leaving, works[0]._pending)]


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v", "dualpipe"])
def test_what_ran_when_is_recorded_and_nothing_is_held_after_a_step(schedule: str) -> None:
    case = make_case(schedule, mtp=1)
    for rank, (spans, held) in enumerate(run_ranks(watch, 2, case)):
        planned = list(schedule_of(case.parallel, 4).lists[rank])
        assert [span.action for span in spans] == planned and {span.rank for span in spans} == {rank}
        assert all(0 <= span.start < span.end for span in spans)
        assert all(before.end <= after.start for before, after in pairwise(spans))
        assert held == [0, 0, 0]


class Forwards(Work):
    """A ``Work`` of two ranks that counts which of its outputs are alive."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Tensor]] = []
        self.alive, self.seen = list[int](), list[float]()

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        if x is not None:
            self.seen.append(float(x.sum()))
            return None
        self.alive.append(sum(made() is not None for made in self.made))
        output = torch.full((1000,), float(microbatch))
        self.made.append(weakref.ref(output))
        return output

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        raise AssertionError

    def weight(self, stage: int, microbatch: int) -> None:
        raise AssertionError

    def finished(self, stage: int) -> None:
        raise AssertionError

    def allocate(self, microbatch: int) -> Tensor:
        return torch.empty(1000)


def send_many(rank: int, world: int, microbatches: int) -> tuple[list[int], list[float], int]:
    mesh, work = Mesh(PAIR, CPU), Forwards()
    program = lower(evaluate(StageMap(((0,), (1,))), microbatches))
    assert Interpreter(mesh.group(Axis.pp, Traffic.pipeline), rank).run(program.lists[rank], work)
    return work.alive, work.seen, sum(made() is not None for made in work.made)


def test_what_is_sent_is_let_go() -> None:
    """At any time as many exchanges are under way as the window has."""
    (alive, _, left), (_, seen, _) = run_ranks(send_many, 2, 20)
    assert max(alive) == WINDOW and left == 0
    assert seen == [1000.0 * microbatch for microbatch in range(20)]
