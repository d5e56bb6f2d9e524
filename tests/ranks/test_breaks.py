"""No collective can go wrong unnoticed: each has a fault planted in it, and the proof must fail.

What is no part of the numbers that a proof compares has a promise instead (promises.py), which must be seen broken. The
controls plant a call that works as it should: then the same proof must pass, and the same promise be kept.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from breaks import KINDS, Break, planted
from promises import PROMISED, Stand, gather_the_plain_weights, keep, make
from sites import UNSEEN, Site, find_sites, find_unseen
from small_models import make_config
from small_runs import write_text
from spawn import RankError, run_ranks
from spoilt import SPOILT
from symmetric import compare_fused

from parallel import collective_matmul, collectives, reduce
from parallel.config import EngineName, PipelineConfig
from parallel.mesh import Mesh
from parallel.pipeline.run import Interpreter
from parallel.topology import Axis, Topology
from parallel.traffic import Traffic
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.plain import trace_plain
from training.proof.prove import prove
from training.proof.report import Report
from training.setup import set_up

TENSOR, EXCHANGE, LOSS = "parallel/tensor.py", "parallel/exchange.py", "parallel/loss.py"
MATMUL = "parallel/collective_matmul.py"
COLLECTIVES, REDUCE, SLAB = "parallel/collectives.py", "parallel/reduce.py", "training/slab.py"
MICROBATCHES, FSDP2, MOVE = "training/microbatches.py", "training/fsdp2.py", "training/move.py"
CROSS_ENTROPY = "VocabularyCrossEntropyFunction.forward"
GATHER, SCATTER = Site(MATMUL, "gather", "all_gather"), Site(MATMUL, "scatter", "sum_scatter")
BLOCKS_GATHER, BLOCKS_SCATTER = (Site(MATMUL, of, "_swap") for of in ("gather_blocks", "scatter_blocks"))
BLOCK = Site(MATMUL, "_swap", "dist.batch_isend_irecv")  # of other backends than gloo
TOTAL = Site(TENSOR, "_total", "all_reduce")
LARGEST, SUMS = Site(LOSS, CROSS_ENTROPY, "all_reduce", 0), Site(LOSS, CROSS_ENTROPY, "all_reduce", 1)
OUT, OUT_BACK = (Site(EXCHANGE, f"ToExperts.{of}", "all_to_all_joined") for of in ("there", "back"))
HOME = Site(EXCHANGE, "FromExperts.there", "all_to_all")
HOME_BACK = Site(EXCHANGE, "FromExperts.back", "all_to_all_joined")
WHOLE = Site(COLLECTIVES, "all_to_all", "dist.all_to_all_single")  # of other backends than gloo
COUNTS = Site(EXCHANGE, "ExpertExchange.announce", "all_to_all")
ADD, COPY = Site(REDUCE, "_add_in_rank_order", "_exchange"), Site(REDUCE, "_copy_to_all", "_exchange")
GRADIENTS, WEIGHTS = Site(SLAB, "Slab.close", "reduce_pieces"), Site(SLAB, "Slab.publish", "gather_pieces")
COUNT, TOTALS = (Site(MICROBATCHES, of, "sum_over") for of in ("count_denominators", "total_over_ranks"))
NORM, ZERO_NORM, ZERO3_NORM = (
    Site("training/native.py", "Native._measure_norm", "sum_over"),
    Site("training/zero.py", "DeepSpeed.step", "sum_over"),
    Site("training/zero3.py", "Zero3.step", "sum_over"),
)
REPLICATED, FSDP2_NORM = (Site(FSDP2, of, "dist.all_reduce") for of in ("_sum", "Fsdp2._measure_norm"))
STAGES = Site("parallel/pipeline/run.py", "Interpreter._exchange", "self._start")
BATCH = Site("parallel/pipeline/run.py", "Interpreter._start", "dist.batch_isend_irecv")  # of other backends than gloo
PARTS, TRAVEL = Site(MOVE, "_move", "dist.all_reduce"), Site(MOVE, "_travel", "all_to_all")
SHARED = ("fsdp2", "fsdp2 pipeline")  # what tp leaves whole, and what two stages have

BREAKS = [
    *(Break(GATHER, kind, ranks) for kind, ranks in (("skipped", 2), ("doubled", 2), ("wrong group", 4))),
    *(Break(SCATTER, kind, ranks) for kind, ranks in (("skipped", 2), ("doubled", 2), ("averaged", 2))),
    Break(SCATTER, "wrong group", 4),
    *(
        Break(site, kind)
        for site in (BLOCKS_GATHER, BLOCKS_SCATTER)
        for kind in ("block lost", "block doubled", "block of the wrong owner")
    ),
    *(Break(site, "block over the wrong group", 4) for site in (BLOCKS_GATHER, BLOCKS_SCATTER)),
    *(Break(BLOCK, kind) for kind in ("lost", "batch doubled")),
    *(Break(TOTAL, kind, ranks) for kind, ranks in (("skipped", 2), ("doubled", 2), ("wrong group", 4))),
    # Any value that all ranks share is as good as the largest: it only keeps the exponentials small.
    *(Break(LARGEST, kind, ranks) for kind, ranks in (("skipped", 2), ("wrong group", 4))),
    *(Break(SUMS, kind, ranks) for kind, ranks in (("skipped", 2), ("averaged", 2), ("wrong group", 4))),
    *(Break(OUT, kind) for kind in ("zeroed", "doubled", "swapped splits", "indices shuffled")),
    *(Break(OUT_BACK, kind) for kind in ("zeroed", "doubled", "averaged", "swapped splits")),
    *(Break(HOME, kind) for kind in ("skipped", "doubled", "swapped splits")),
    *(Break(HOME_BACK, kind) for kind in ("zeroed", "doubled", "averaged", "swapped splits")),
    Break(Site(COLLECTIVES, "all_to_all_joined", "all_to_all"), "swapped splits"),
    *(Break(ADD, kind) for kind in ("received doubled", "received averaged")),
    *(Break(COPY, kind) for kind in ("received doubled", "received averaged")),
    *(Break(GRADIENTS, kind, ranks) for kind, ranks in (("never started", 2), ("wrong group", 4))),
    *(Break(WEIGHTS, kind, ranks) for kind, ranks in (("never started", 2), ("wrong group", 4))),
    Break(Site(REDUCE, "_exchange", "dist.batch_isend_irecv"), "lost"),
    Break(Site(COLLECTIVES, "all_gather", "dist.all_gather_single"), "erased"),
    Break(Site(COLLECTIVES, "all_to_all", "_post"), "received doubled"),
    Break(WHOLE, "erased"),
    Break(Site(COLLECTIVES, "all_reduce", "dist.all_reduce"), "left alone"),
    Break(Site(COLLECTIVES, "_reduce_scatter", "dist.reduce_scatter_single"), "erased"),
    Break(Site(COLLECTIVES, "_exchange_and_add", "dist.all_to_all_single"), "erased"),
    Break(Site("training/agree.py", "sum_over", "dist.all_reduce"), "left alone"),
    *(Break(COUNT, kind, ranks) for kind, ranks in (("own alone", 4), ("counted twice", 2), ("wrong axis", 2))),
    *(Break(TOTALS, kind, ranks) for kind, ranks in (("own alone", 2), ("counted twice", 2), ("wrong axis", 4))),
    *(Break(NORM, kind, ranks) for kind, ranks in (("own alone", 2), ("counted twice", 2), ("wrong axis", 4))),
    *(
        Break(site, kind, how=how)
        for site, how in ((ZERO_NORM, "zero1"), (ZERO3_NORM, "zero3"))
        for kind in ("own alone", "counted twice")
    ),
    *(Break(REPLICATED, kind, how=how) for how in SHARED for kind in ("left alone", "doubled in place")),
    *(Break(FSDP2_NORM, kind, how="fsdp2") for kind in ("left alone", "doubled in place")),
    *(Break(PARTS, kind, 4, how="moving") for kind in ("left alone", "doubled in place", "wrong group")),
    *(Break(TRAVEL, kind, how="moving") for kind in ("skipped", "doubled", "swapped splits")),
    *(Break(STAGES, kind, how="pipeline") for kind in ("unsent", "sent doubled")),
    *(Break(BATCH, kind, how="pipeline") for kind in ("lost", "batch doubled")),
    *(Break(site, "own alone", how="pipeline") for site in (TOTALS, NORM)),
    *(Break(site, "received doubled", how="pipeline") for site in (ADD, COPY)),  # of the embedding, for MTP
]
LOUD = [Break(COUNTS, "shuffled")]  # what is sent with wrong sizes does not arrive: no number could be wrong
MOVES = [  # faults of what is sent, not of the sending
    Break(Site(MOVE, "move_experts", "_move"), "first moments stay", how="moving"),
    Break(Site(MOVE, "_move", "_travel"), "the other way", how="moving"),
]
CONTROLS = [
    *(Break(site, "nothing") for site in (GATHER, BLOCKS_GATHER, BLOCKS_SCATTER, BLOCK, OUT, HOME, COUNTS, ADD)),
    *(
        Break(site, "nothing", how=how)
        for site, how in (
            (FSDP2_NORM, "fsdp2"),
            (ZERO_NORM, "zero1"),
            (ZERO3_NORM, "zero3"),
            (TRAVEL, "moving"),
            (REPLICATED, "fsdp2 pipeline"),
            (STAGES, "pipeline"),
            (BATCH, "pipeline"),
        )
    ),
    *(Break(site, "nothing", 4, how) for site, how in ((REPLICATED, "fsdp2"), (PARTS, "moving"))),
]
PIPELINE = {
    "topology": Topology(pp=2),
    "pipeline": PipelineConfig(schedule="1f1b"),
    "model": make_config(num_layers=3, mtp=1),
    "accumulation": 3,
}
ZERO3 = {"engine": EngineName.zero3, "topology": Topology(dp=2)}
CASES: dict[str, dict[str, Any]] = {
    "native": {},
    "fsdp2": {"engine": EngineName.fsdp2},
    "zero1": {"engine": EngineName.zero1},
    "zero3": ZERO3,
    "zero3 gathers": ZERO3,
    "moving": {"rebalance": True, "steps": 2},
    "pipeline": PIPELINE,
    "fsdp2 pipeline": {**PIPELINE, "engine": EngineName.fsdp2},
}
# What other backends than gloo use: with equal pieces gloo can do it as well.
PIECES = [
    Break(Site(REDUCE, "_reduce_scatter", "dist.reduce_scatter"), "left alone"),
    Break(Site(REDUCE, "_all_gather", "dist.all_gather"), "left alone"),
]
KEPT = [Break(broken.site, "nothing", how=broken.how) for broken in {b.how: b for b in PROMISED}.values()]
Verdicts = dict[Break, tuple[Report, int]]


def make_case(ranks: int, how: str) -> Case:
    """One step; tp and ep over the same two ranks, and dp over as many such pairs as there are; or a pipeline.

    Sizes divide by tp: the same message then fits every group, and only its numbers are wrong."""
    case = Case(
        topology=Topology(dp=ranks // 2, tp=2, ep=2),
        model=make_config(num_layers=1, dense_layers=0, vocab_size=20, moe={"ffn": 6}),
        optimizer=OptimizerConfig(lr=1e-3, clip=0.3),
        steps=1,
    )
    return replace(case, **CASES[how])


def prove_broken(rank: int, world: int, breaks: list[Break]) -> Verdicts:
    """Every break on its own, and how often the broken call was made."""
    cases = {how: make_case(world, how) for how in {broken.how for broken in breaks}}
    references = {how: trace_plain(case) for how, case in cases.items()}
    meshes = {topology: Mesh(topology, torch.device("cpu")) for topology in {case.topology for case in cases.values()}}
    verdicts = {}
    for broken in breaks:
        mesh = meshes[cases[broken.how].topology]
        with pytest.MonkeyPatch.context() as patch, planted(broken, mesh) as hits:
            if broken.site.function == "_reduce_scatter":
                patch.setattr(collectives, "sums_itself", lambda group: False)
            if broken.site == WHOLE:
                patch.setattr(collectives, "posts_itself", lambda group: False)
            if broken.site == BLOCK:
                patch.setattr(collective_matmul, "_batches", lambda group: True)
            if broken.site == BATCH:
                patch.setattr(Interpreter, "_start", send_batches(Interpreter._start))
            verdicts[broken] = (prove(cases[broken.how], mesh, references[broken.how]), len(hits))
    return verdicts


def send_batches(start: Callable[..., Any]) -> Callable[..., Any]:
    """``Interpreter._start`` as on backends that have batches."""

    def batched(self: Interpreter, *args: Any) -> Any:
        self._batches = True
        return start(self, *args)

    return batched


def move_pieces(rank: int, world: int, broken: Break) -> list[float]:
    """Rank r has [r + 1, r + 1, ...]: the sum in its own piece, and a copy of the others' pieces."""
    mesh = Mesh(Topology(dp=world), torch.device("cpu"))
    group, pieces = mesh.group(Axis.stage, Traffic.data), [range(2 * r, 2 * r + 2) for r in range(world)]
    reduce.sums_itself = lambda group: False
    with planted(broken, mesh):
        summed, copied = (torch.full((2 * world,), rank + 1.0) for _ in range(2))
        reduce.reduce_pieces(summed, pieces, group)()
        reduce.gather_pieces(copied, pieces, group)()
    return [*summed[2 * rank : 2 * rank + 2].tolist(), *copied.tolist()]


def spoil_libraries(rank: int, world: int, folder: Path) -> dict[str, list[bool]]:
    """Whether all is right: as it is, and spoilt. Two replicas, each with half of the experts where that can be."""
    found = {}
    for what, spoil in SPOILT.items():
        topology = CASES.get(what, {}).get("topology", Topology(dp=2, ep=2))
        mesh = Mesh(topology, torch.device("cpu"))
        found[what] = []
        for spoilt in (False, True):
            with pytest.MonkeyPatch.context() as patch:
                if spoilt:
                    spoil(patch)
                if what == "gather":
                    setup = set_up(make(folder, EngineName.fsdp2), lambda line: None, mesh)
                    found[what].append(gather_the_plain_weights(Stand(setup, folder)))
                else:
                    found[what].append(prove(replace(make_case(2, what), topology=topology), mesh).passed)
    return found


def forget_the_head(rank: int, world: int) -> Report:
    """ZeRO-3 is not told that the model uses the head's weight itself."""
    import deepspeed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.zero, "register_external_parameter", lambda module, parameter: None)
        return prove(make_case(2, "zero3"), Mesh(Topology(dp=2), torch.device("cpu")))


def name(broken: Break) -> str:
    return f"{broken.site.function}-{broken.site.callee}{broken.site.index}-{broken.kind}-{broken.how}{broken.ranks}"


def kin(broken: Break) -> tuple[object, ...]:
    """Breaks that are alike in this are proved on the same ranks, one after the other."""
    return broken.ranks, broken.how, broken.site.file.startswith("parallel")


@pytest.fixture(scope="module")
def judge() -> Callable[[Break], tuple[Report, int]]:
    """The verdict on a break; the first that is asked for brings those of all its kin."""
    found: Verdicts = {}

    def find(broken: Break) -> tuple[Report, int]:
        if broken not in found:
            some = [other for other in BREAKS + MOVES + CONTROLS if kin(other) == kin(broken)]
            found.update(run_ranks(prove_broken, broken.ranks, some)[0])
        return found[broken]

    return find


def weigh(broken: Break) -> Any:
    """DeepSpeed's ZeRO-3 takes as long as all others together: it is for the wide run."""
    return pytest.param(broken, marks=pytest.mark.full) if broken.how == "zero3" else broken


@pytest.mark.parametrize("broken", [weigh(broken) for broken in BREAKS + MOVES], ids=name)
def test_the_proof_notices(broken: Break, judge: Callable[[Break], tuple[Report, int]]) -> None:
    report, calls = judge(broken)
    assert calls, "the call was never made"
    assert not report.passed, report


@pytest.mark.parametrize("control", [weigh(control) for control in CONTROLS], ids=name)
def test_a_planted_call_that_works_passes(control: Break, judge: Callable[[Break], tuple[Report, int]]) -> None:
    report, calls = judge(control)
    assert calls and report.passed, report


@pytest.mark.parametrize("broken", LOUD, ids=name)
def test_wrong_sizes_end_the_run(broken: Break) -> None:
    with pytest.raises(RankError, match="must match the size"):
        run_ranks(prove_broken, 2, [broken])


@pytest.mark.parametrize("broken", PIECES, ids=name)
def test_pieces_move_by_other_backends(broken: Break) -> None:
    right = [[3.0, 3.0, 1.0, 1.0, 2.0, 2.0]] * 2
    assert run_ranks(move_pieces, 2, broken._replace(kind="nothing")) == right
    assert all(moved != right[0] for moved in run_ranks(move_pieces, 2, broken))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Break, tuple[bool, int]]]:
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("promises")
    write_text(folder)
    return run_ranks(keep, 2, PROMISED + KEPT, folder)


@pytest.mark.parametrize("broken", PROMISED + KEPT, ids=name)
def test_promises_are_kept_and_seen_broken(broken: Break, kept: list[dict[Break, tuple[bool, int]]]) -> None:
    assert sum(seen[broken][1] for seen in kept), "the call was never made"
    assert all(seen[broken][0] for seen in kept) == (broken.kind == "nothing")


def test_libraries_are_proved_as_well(tmp_path: Path) -> None:
    write_text(tmp_path)
    found = run_ranks(spoil_libraries, 2, tmp_path)[0]
    assert found == {what: [True, False] for what in SPOILT}


def test_fused_operators_are_asked_for_the_right_thing() -> None:
    for right, wrong in run_ranks(compare_fused, 2):
        assert right < 1e-12 and wrong > 1e-3


@pytest.mark.full
def test_a_weight_that_nobody_gathers_ends_the_run() -> None:
    """It is empty: there is no number that could be wrong."""
    with pytest.raises(RankError, match=r"split_chunks[\s\S]*ZeroDivisionError"):
        run_ranks(forget_the_head, 2)


def test_every_collective_has_a_break() -> None:
    assert {broken.site for broken in BREAKS + LOUD + PIECES + PROMISED} == find_sites()
    assert {broken.kind for broken in BREAKS + LOUD + MOVES + CONTROLS + PIECES + PROMISED} == set(KINDS)


def test_what_sends_unseen_is_listed() -> None:
    assert {(unseen.file, name) for unseen in UNSEEN for name in unseen.names} == find_unseen()
    assert all(unseen.test in globals() for unseen in UNSEEN)
