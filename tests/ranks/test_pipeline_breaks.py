"""Faults of pipelines: each is planted where it would be made, and the proof, which passes without it, must fail.

Every layout has at least three micro-batches: with fewer, a pipeline has nothing to confuse.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from small_models import make_config
from spawn import RankError
from test_wrong_elsewhere import Fault, Patch, find_failures
from torch import Tensor

from parallel import build
from parallel.build import Shards, Stages
from parallel.config import PipelineConfig
from parallel.mesh import Mesh
from parallel.pipeline import run
from parallel.pipeline.action import Action, Op, Overlap, parts
from parallel.pipeline.lower import Exchange, Kind, Step, What
from parallel.pipeline.run import Interpreter
from parallel.pipeline.schedules import SCHEDULES
from parallel.topology import Axis, Topology
from training.config import OptimizerConfig
from training.pipeline import Training
from training.proof import sharded
from training.proof.case import Case

CHOSEN = 1  # the micro-batch that something happens to


def make_case(schedule: str, topology: Topology, microbatches: int = 3, virtual: int = 1, **model: Any) -> Case:
    """A layer a stage and one more."""
    stages = SCHEDULES[schedule].stages(topology.pp, virtual)
    return Case(
        topology=topology,
        model=make_config(num_layers=stages + 1, **model),
        optimizer=OptimizerConfig(lr=1e-3, clip=0.3),
        pipeline=PipelineConfig(schedule=schedule, virtual=virtual),
        accumulation=microbatches,
        steps=1,
    )


def send_zeros(patch: Patch, what: What) -> None:
    """One of the things that are sent is dropped: zeros arrive."""
    exchange = Interpreter._exchange

    def broken(self: Interpreter, step: Exchange, work: run.Work) -> None:
        for kind, *name, _ in step.transfers:
            held = self._held.get(tuple(name))  # type: ignore[call-overload]
            if kind is Kind.send and name[0] is what and name[2] == CHOSEN:
                assert isinstance(held, Tensor)
                self._held[tuple(name)] = torch.zeros_like(held)  # type: ignore[index]
        exchange(self, step, work)

    patch.setattr(Interpreter, "_exchange", broken)


def drop_an_activation(patch: Patch, mesh: Mesh) -> None:
    send_zeros(patch, What.activation)


def drop_a_gradient(patch: Patch, mesh: Mesh) -> None:
    send_zeros(patch, What.gradient)


def swap_microbatches(patch: Patch, mesh: Mesh) -> None:
    """The last rank takes the second micro-batch for the third."""
    swapped = {1: 2, 2: 1}

    def rename(step: Any) -> Step:
        if isinstance(step, Exchange):
            return Exchange(
                tuple(t._replace(microbatch=swapped.get(t.microbatch, t.microbatch)) for t in step.transfers)
            )
        if isinstance(step, Overlap):
            return Overlap(*(Action(op, stage, swapped.get(number, number)) for op, stage, number in step))
        return step._replace(microbatch=swapped.get(step.microbatch, step.microbatch))

    right = Interpreter.run

    def wrong(self: Interpreter, steps: Any, work: run.Work, *rest: Any) -> bool:
        last = mesh.coordinate(Axis.pp) == mesh.degree(Axis.pp) - 1
        return right(self, [rename(step) for step in steps] if last else steps, work, *rest)

    patch.setattr(Interpreter, "run", wrong)


def compute_weights_of_another(patch: Patch, mesh: Mesh) -> None:
    """A W computes what the micro-batch before has put off."""
    right, kept = Training.weight, dict[int, list[Any]]()

    def wrong(self: Training, stage: int, microbatch: int) -> None:
        deferred = self._pending[stage, microbatch].deferred
        assert deferred
        if microbatch == CHOSEN + 1:
            deferred[:] = kept[stage]
        kept[stage] = list(deferred)
        right(self, stage, microbatch)

    patch.setattr(Training, "weight", wrong)


def compute_weights_early(patch: Patch, mesh: Mesh) -> None:
    """A W runs when its I has put half of it off: what comes after is computed by nobody."""
    right = Training.weight

    def wrong(self: Training, stage: int, microbatch: int) -> None:
        deferred = self._pending[stage, microbatch].deferred
        assert deferred
        if microbatch == CHOSEN:
            del deferred[len(deferred) // 2 :]
        right(self, stage, microbatch)

    patch.setattr(Training, "weight", wrong)


def lose_a_weight_gradient(patch: Patch, mesh: Mesh) -> None:
    """One of those that a micro-batch has put off."""
    right = Training.weight

    def wrong(self: Training, stage: int, microbatch: int) -> None:
        deferred = self._pending[stage, microbatch].deferred
        assert deferred
        if microbatch == CHOSEN:
            deferred.pop()
        right(self, stage, microbatch)

    patch.setattr(Training, "weight", wrong)


def forget_other_holders(patch: Patch, of: str) -> None:
    """The engine takes parameters that two pipeline ranks hold for those of one."""
    right = sharded.build_engine

    def wrong(name: Any, stages: Stages, shards: Shards, *rest: Any) -> Any:
        cut = {n: shard._replace(across=()) if n.startswith(of) else shard for n, shard in shards.items()}
        return right(name, stages, cut, *rest)

    patch.setattr(sharded, "build_engine", wrong)


def reduce_one_copy(patch: Patch, mesh: Mesh) -> None:
    """Of a stage that two ranks have."""
    forget_other_holders(patch, "layers.")


def reduce_one_end(patch: Patch, mesh: Mesh) -> None:
    """The first and the last stage each go on with their own gradient of the embedding."""
    forget_other_holders(patch, "embedding.")


def count_an_embedding_twice(patch: Patch, mesh: Mesh) -> None:
    """A parameter that two stages of a rank share gets its gradient once for each."""
    right = sharded.build_stages

    def wrong(*args: Any) -> tuple[Stages, Shards]:
        stages, shards = right(*args)
        ends = [model.embedding.weight for model in stages.values() if hasattr(model, "embedding")]
        if len(ends) == 2 and ends[0] is ends[1]:
            ends[0].register_hook(lambda gradient: gradient * 2)
        return stages, shards

    patch.setattr(sharded, "build_stages", wrong)


def have_an_embedding_twice(patch: Patch, mesh: Mesh) -> None:
    """Two stages of a rank have one each."""
    patch.setattr(build, "share_embedding", lambda one, other: None)


def finish_early(patch: Patch, mesh: Mesh) -> None:
    """A stage is through with its last input gradient."""

    def find(steps: Sequence[Step]) -> dict[int, tuple[int, Action]]:
        computes = [(number, step) for number, step in enumerate(steps) if not isinstance(step, Exchange)]
        actions = [(number, action) for number, step in computes for action in parts(step)]
        return {action.stage: (number, action) for number, action in actions if action.op in (Op.B, Op.I)}

    patch.setattr(run, "_find_last", find)


PAIR, SQUARE = Topology(pp=2), Topology(pp=2, dp=2)
FAULTS: list[tuple[Fault, Case, str]] = [  # and what must be wrong at least
    (drop_an_activation, make_case("1f1b", PAIR), "loss"),
    (drop_an_activation, make_case("interleaved_1f1b", PAIR, virtual=2), "loss"),
    (drop_a_gradient, make_case("1f1b", PAIR), "gradients"),
    (drop_a_gradient, make_case("dualpipev", PAIR, 4), "gradients"),
    (swap_microbatches, make_case("gpipe", PAIR), "loss"),
    (swap_microbatches, make_case("1f1b", PAIR), "loss"),
    (compute_weights_of_another, make_case("zb_h1", PAIR), "gradients"),
    (compute_weights_early, make_case("zb_h1", PAIR), "gradients"),
    (lose_a_weight_gradient, make_case("zb_v", PAIR), "gradients"),
    (reduce_one_copy, make_case("dualpipe", PAIR, 4), "replicas"),
    (reduce_one_end, make_case("1f1b", PAIR, mtp=1), "replicas"),
    (reduce_one_end, make_case("gpipe", PAIR, tied=True), "replicas"),
    (count_an_embedding_twice, make_case("zb_v", PAIR, tied=True), "gradients"),
    (have_an_embedding_twice, make_case("zb_v", PAIR, tied=True), "gradients"),
]


def name(value: Any) -> str | None:
    return value.pipeline.schedule if isinstance(value, Case) else getattr(value, "__name__", None)


@pytest.mark.parametrize(("fault", "case", "wrong"), FAULTS, ids=name)
def test_the_proof_notices(fault: Fault, case: Case, wrong: str) -> None:
    assert case.accumulation >= 3
    failures = find_failures(case, fault)
    assert wrong in failures
    if wrong in ("replicas", "engine's gradients"):  # the model has done its part
        assert not {"loss", "gradients"} & failures.keys()


def test_a_gradient_that_comes_when_its_stage_is_through_ends_the_run() -> None:
    """Its sum is on its way: nothing that it could still be added to."""
    with pytest.raises(RankError, match="got a gradient after the sum over its holders had started"):
        find_failures(make_case("zb_h1", SQUARE), finish_early)
