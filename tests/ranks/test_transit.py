"""Buckets in transit on real ranks: sums inside the backward and copies under the forward change no bit, and faults in
either are noticed."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from small_models import make_config, make_denominators
from spawn import RankError, run_ranks
from test_pipelines import make
from torch import Tensor, nn

from model.batch import Losses
from model.compile import compile_segments
from parallel.config import PipelineConfig
from parallel.mesh import Mesh
from parallel.topology import Topology
from training import slab
from training.config import OptimizerConfig
from training.countdown import Countdown
from training.gather import name_tensors
from training.native import Native
from training.proof.case import Case, share_batch
from training.proof.steps import shuffle_experts, take_step
from training.transit import Travel

CPU = torch.device("cpu")
DP = Topology(dp=2)
Pieces = Sequence[range]


class Taken(NamedTuple):
    """What a rank has after the steps of a case."""

    steps: list[tuple[Any, ...]]  # losses, loads, norm
    weights: dict[str, Tensor]
    inside: list[int]  # buckets a step whose sum started before their stage was finished
    started: list[tuple[Any, ...]]  # every sum: the ranks of its group, its pieces


def make_case(topology: Topology = DP, schedule: str = "1f1b", steps: int = 3, **changes: Any) -> Case:
    """Buckets of a parameter or two."""
    return Case(
        topology=topology,
        model=make_config(**{"num_layers": 4, "mtp": 1, "tied": True, **changes.pop("model", {})}),
        optimizer=OptimizerConfig(lr=1e-2, clip=0.3, bucket_bytes=2048),
        pipeline=PipelineConfig(schedule=schedule, virtual=changes.pop("virtual", 1)),
        **{"accumulation": 4, **changes},
        steps=steps,
    )


CASES = {
    "dp2, tied": make_case(accumulation=3),
    "dp2, a micro-batch a step": make_case(accumulation=1, micro_batch=2),
    "dp2 ep2, experts move": make_case(Topology(dp=4, ep=2), rebalance=True),
    "dp2 tp2": make_case(Topology(dp=2, tp=2), model={"attention": {"heads": 4}}),
    "pp2 dp2, two stages a rank": make_case(Topology(pp=2, dp=2), "interleaved_1f1b", virtual=2),
    "pp2 dp2, weights put off": make_case(Topology(pp=2, dp=2), "zb_h1"),
    "pp2 dp2, a V": make_case(Topology(pp=2, dp=2), "zb_v"),
    "pp2 dp2 ep2, copies": make_case(Topology(pp=2, dp=2, ep=2), "dualpipe", model={"tied": False}),
}
QUICK = {"dp2, tied", "dp2, a micro-batch a step", "pp2 dp2, weights put off"}
# Whether sums start inside of the backwards of each step, where not from the second on: what was put off is known at
# once, and what copies share waits for the last stage.
EARLY = {"zb_h1": [True] * 3, "zb_v": [True] * 3, "dualpipe": [False] * 3}


@contextmanager
def changed(patch: pytest.MonkeyPatch, started: list[tuple[Any, ...]], inside: list[int]) -> Iterator[None]:
    """Notes every sum, and how many started inside of a backward."""
    reduce, finished = slab.reduce_pieces, Native.finished

    def note(buffer: Tensor, pieces: Pieces, group: Any) -> Callable[[], None]:
        started.append((tuple(dist.get_process_group_ranks(group)), tuple(pieces), len(buffer)))
        return reduce(buffer, pieces, group)

    def count(self: Native, stage: int) -> None:
        early = (bucket.is_started() for bucket in self._sums._queues[stage])
        inside[-1] += sum(early)
        finished(self, stage)

    patch.setattr(slab, "reduce_pieces", note)
    patch.setattr(Native, "finished", count)
    yield


def train(rank: int, world: int, case: Case, how: str = "inside") -> Taken:
    """The steps of a case; ``how`` is a key of WAYS."""
    mesh, inside, started = Mesh(case.topology, CPU), list[int](), list[tuple[Any, ...]]()
    with pytest.MonkeyPatch.context() as patch, changed(patch, started, inside):
        stages, engine, runner = make(case, mesh, torch.float32)
        WAYS[how](patch, rank, engine)
        steps = []
        for step in range(case.steps):
            inside.append(0)
            steps.append(take_step(case, mesh, stages, engine, runner, step))
            if case.rebalance:
                shuffle_experts(case, stages, find_shards(engine), engine, mesh, step)
        engine.settle()
    rows = [(*step.sums.tolist(), *step.load.flatten().tolist(), step.update.norm) for step in steps]
    weights = {name: tensor.clone() for name, tensor in name_tensors(stages.values()).items()}
    return Taken(rows, weights, inside, started)


def find_shards(engine: Native) -> Any:
    """What part of the whole each parameter is."""
    return {entry.name: entry.shard for each in engine._slabs for entry in each._entries}


def all_at_the_end(patch: pytest.MonkeyPatch, rank: int, engine: Native) -> None:
    """No sum starts before its stage is finished."""
    patch.setattr(Countdown, "open", lambda self, coming=None: range(0))


def start_at_once(patch: pytest.MonkeyPatch, rank: int, engine: Native) -> None:
    """The planted break: a gradient is taken for the last one before it is."""
    patch.setattr(Countdown, "_is_complete", lambda self, member: True)


def lack_gradients(patch: pytest.MonkeyPatch, rank: int, engine: Native) -> None:
    """In the last backward of a step, each rank lacks that of another parameter, and each step of another one."""
    accumulate, finishing, finished = Native.accumulate, Native.finishing, Native.finished
    parameters, last, count = list(engine._slab_of), [False], [11 * rank]

    def begin_last(self: Native, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        last[0], count[0] = True, count[0] + 7
        finishing(self, stage, coming)

    def accumulate_some(self: Native, parameter: nn.Parameter, grad: Tensor) -> None:
        if not last[0] or parameter is not parameters[count[0] % len(parameters)]:
            accumulate(self, parameter, grad)

    def end_last(self: Native, stage: int) -> None:
        last[0] = False
        finished(self, stage)

    patch.setattr(Native, "accumulate", accumulate_some)
    patch.setattr(Native, "finishing", begin_last)
    patch.setattr(Native, "finished", end_last)


def lack_gradients_at_the_end(patch: pytest.MonkeyPatch, rank: int, engine: Native) -> None:
    """Both."""
    lack_gradients(patch, rank, engine)
    patch.setattr(Countdown, "open", lambda self, coming=None: range(0))


def copy_late(patch: pytest.MonkeyPatch, rank: int, engine: Native) -> None:
    """Until its copy is waited for, what others own of a bucket is no number."""
    gather = slab.gather_pieces

    def spoil(buffer: Tensor, pieces: Pieces, group: Any) -> Callable[[], None]:
        aside = buffer.clone()
        finish, whole = gather(aside, pieces, group), slice(pieces[0].start, pieces[-1].stop)
        for place, piece in enumerate(pieces):
            if place != dist.get_rank(group):
                buffer[piece.start : piece.stop].fill_(torch.nan)

        def finish_late() -> None:
            finish()
            buffer[whole] = aside[whole]

        return finish_late

    patch.setattr(slab, "gather_pieces", spoil)


WAYS: dict[str, Callable[[pytest.MonkeyPatch, int, Native], None]] = {
    "inside": lambda patch, rank, engine: None,
    "at the end": all_at_the_end,
    "at once": start_at_once,
    "gradients lack": lack_gradients,
    "gradients lack, at the end": lack_gradients_at_the_end,
    "copied late": copy_late,
}


def compare_ways(rank: int, world: int, case: Case, ways: list[str]) -> list[Taken]:
    return [train(rank, world, case, how) for how in ways]


def weigh(name: str) -> Any:
    """A few are enough for every run."""
    return name if name in QUICK else pytest.param(name, marks=pytest.mark.full)


@pytest.mark.parametrize("name", [weigh(name) for name in CASES])
def test_when_sums_start_and_copies_arrive_changes_no_bit(name: str) -> None:
    case = CASES[name]
    for end, inside, late in run_ranks(
        compare_ways, case.topology.world, case, ["at the end", "inside", "copied late"]
    ):
        early = [number > 0 for number in inside.inside]
        assert not any(end.inside) and early == EARLY.get(case.pipeline.schedule, [False, True, True])
        assert inside.started == end.started and late.inside == inside.inside
        for other in (inside, late):
            assert other.steps == end.steps and len({loss for loss, *_ in end.steps}) == case.steps
            assert all(torch.equal(tensor, other.weights[name]) for name, tensor in end.weights.items())


@pytest.mark.parametrize("name", ["dp2, tied", "pp2 dp2, weights put off"])
def test_ranks_that_lack_gradients_start_the_same_sums_in_the_same_order(name: str) -> None:
    case = CASES[name]
    ways = ["gradients lack", "gradients lack, at the end"]
    ranks = run_ranks(compare_ways, case.topology.world, case, ways)
    for inside, end in ranks:
        assert inside.steps == end.steps
        assert all(torch.equal(tensor, end.weights[name]) for name, tensor in inside.weights.items())
    assert any(any(inside.inside) for inside, _ in ranks)
    assert any(inside.inside != ranks[0][0].inside for inside, _ in ranks), "all ranks started alike: nothing is tested"
    groups = {group for taken, _ in ranks for group, *_ in taken.started if len(group) > 1}
    for group in groups:
        orders = [[each for each in ranks[rank][0].started if each[0] == group] for rank in group]
        assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("name", ["dp2, tied", "pp2 dp2, weights put off"])
def test_a_sum_that_starts_before_its_last_gradient_ends_the_run(name: str) -> None:
    with pytest.raises(RankError, match="got a gradient after the sum over its holders had started"):
        run_ranks(train, CASES[name].topology.world, CASES[name], "at once")


def forget_copies(rank: int, world: int, case: Case) -> list[bool]:
    """Whether a loss is a number with weights on their way: with all waited for, then with one bucket forgotten, each
    in turn."""
    mesh = Mesh(case.topology, CPU)
    batch, denominators = share_batch(case, mesh, 0)[0], make_denominators(case.model)
    _, engine, _ = make(case, mesh, torch.float32)
    finite = []
    with pytest.MonkeyPatch.context() as patch:
        copy_late(patch, rank, engine)
        for forgotten in range(-1, len(engine._copies._buckets)):
            engine._copies.launch()
            under_way = engine._copies._ahead._under_way
            finish = under_way[forgotten]
            if forgotten >= 0:
                under_way[forgotten] = lambda: None
            loss: Losses = engine.forward(0, batch, denominators)  # type: ignore[assignment]
            finite.append(bool(loss.total.isfinite()))
            engine.settle()
            if forgotten >= 0:
                finish()
    return finite


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_that_nobody_waits_for_is_noticed(tied: bool) -> None:
    """Whatever the bucket; and where all are waited for, no loss has seen one too early. Each parameter has one."""
    case = make_case(accumulation=1, micro_batch=2, model={"tied": tied, "num_layers": 2})
    case = replace(case, optimizer=replace(case.optimizer, bucket_bytes=1))
    # A small parameter may be one rank's alone: the other one misses it.
    finite = [all(ranks) for ranks in zip(*run_ranks(forget_copies, 2, case), strict=True)]
    assert len(finite) > 30 and finite == [True] + [False] * (len(finite) - 1)


def read_at_once(rank: int, world: int, case: Case, compiled: bool) -> tuple[bool, ...]:
    """Whether weights are numbers: right after a step, once settled, and after a state was taken and loaded."""
    warnings.simplefilter("ignore")  # torch's compiler warns of its own doings
    mesh, seen = Mesh(case.topology, CPU), []
    with pytest.MonkeyPatch.context() as patch:
        stages, engine, runner = make(case, mesh, torch.float32)
        if compiled:
            compile_segments(stages[0], backend="eager")
        copy_late(patch, rank, engine)
        for step in range(3):
            take_step(case, mesh, stages, engine, runner, step)
            seen.append(all(bool(p.isfinite().all()) for p in stages[0].parameters()))
            if step == 0:
                engine.settle()
            elif step == 1:
                engine.load(engine.state())
            seen.append(all(bool(p.isfinite().all()) for p in stages[0].parameters()))
        engine.settle()
    return tuple(seen)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_weights_are_there_once_settled(compiled: bool) -> None:
    for seen in run_ranks(read_at_once, 2, make_case(model={"tied": False}), compiled):
        assert seen == (False, True, False, True, False, False)


def record(rank: int, world: int, case: Case) -> tuple[list[Travel], int]:
    mesh, travels = Mesh(case.topology, CPU), list[Travel]()
    stages, engine, runner = make(case, mesh, torch.float32)
    engine.record(travels)
    for step in range(2):
        take_step(case, mesh, stages, engine, runner, step)
    engine.settle()
    engine.record(None)
    take_step(case, mesh, stages, engine, runner, 2)
    engine.settle()
    return travels, len(engine._copies._buckets)


def test_what_was_under_way_when_is_recorded() -> None:
    for travels, buckets in run_ranks(record, 2, make_case()):
        for what in ("sum", "copy"):
            some = [travel for travel in travels if travel.what == what]
            assert len(some) == 2 * buckets and all(travel.start < travel.end for travel in some)
            numbers = [travel.bucket for travel in some]
            assert numbers == 2 * sorted(set(numbers), reverse=what == "sum")
