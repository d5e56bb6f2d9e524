"""No collective can go wrong unnoticed: each has a fault planted in it, and the proof must fail.

The control plants a call that works as it should: then the same proof must pass.
"""

import pytest
import torch
from breaks import KINDS, Break, Site, find_sites, planted
from small_models import make_config
from spawn import run_ranks

from parallel import collectives, reduce
from parallel.mesh import Mesh
from parallel.topology import Axis, Topology
from parallel.traffic import Traffic
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.plain import trace_plain
from training.proof.prove import prove
from training.proof.report import Report

TENSOR, EXCHANGE, LOSS = "parallel/tensor.py", "parallel/exchange.py", "parallel/loss.py"
COLLECTIVES, REDUCE, SLAB = "parallel/collectives.py", "parallel/reduce.py", "training/slab.py"
CROSS_ENTROPY = "VocabularyCrossEntropyFunction.forward"
GATHER, SCATTER = Site(TENSOR, "_gather", "all_gather"), Site(TENSOR, "_scatter", "sum_scatter")
TOTAL = Site(TENSOR, "_total", "all_reduce")
LARGEST, SUMS = Site(LOSS, CROSS_ENTROPY, "all_reduce", 0), Site(LOSS, CROSS_ENTROPY, "all_reduce", 1)
FORTH, BACK = Site(EXCHANGE, "AllToAll.forward", "all_to_all"), Site(EXCHANGE, "AllToAll.backward", "all_to_all")
COUNTS = Site(EXCHANGE, "ExpertExchange.dispatch", "all_to_all")
ADD, COPY = Site(REDUCE, "_add_in_rank_order", "_exchange"), Site(REDUCE, "_copy_to_all", "_exchange")
GRADIENTS, WEIGHTS = Site(SLAB, "Slab.reduce", "reduce_pieces"), Site(SLAB, "Slab.publish", "gather_pieces")

BREAKS = [
    *(Break(GATHER, kind, ranks) for kind, ranks in (("skipped", 2), ("doubled", 2), ("wrong group", 4))),
    *(Break(SCATTER, kind, ranks) for kind, ranks in (("skipped", 2), ("doubled", 2), ("averaged", 2))),
    Break(SCATTER, "wrong group", 4),
    *(Break(TOTAL, kind, ranks) for kind, ranks in (("skipped", 2), ("doubled", 2), ("wrong group", 4))),
    # Any value that all ranks share is as good as the largest: it only keeps the exponentials small.
    *(Break(LARGEST, kind, ranks) for kind, ranks in (("skipped", 2), ("wrong group", 4))),
    *(Break(SUMS, kind, ranks) for kind, ranks in (("skipped", 2), ("averaged", 2), ("wrong group", 4))),
    *(Break(FORTH, kind) for kind in ("skipped", "doubled", "swapped splits")),
    *(Break(BACK, kind) for kind in ("skipped", "doubled", "averaged", "swapped splits")),
    Break(COUNTS, "shuffled"),
    *(Break(ADD, kind) for kind in ("received doubled", "received averaged")),
    *(Break(COPY, kind) for kind in ("received doubled", "received averaged")),
    *(Break(GRADIENTS, kind, ranks) for kind, ranks in (("never started", 2), ("wrong group", 4))),
    *(Break(WEIGHTS, kind, ranks) for kind, ranks in (("never started", 2), ("wrong group", 4))),
    Break(Site(REDUCE, "_exchange", "dist.batch_isend_irecv"), "lost"),
    Break(Site(COLLECTIVES, "all_gather", "dist.all_gather_single"), "erased"),
    Break(Site(COLLECTIVES, "all_to_all", "dist.all_to_all_single"), "erased"),
    Break(Site(COLLECTIVES, "all_reduce", "dist.all_reduce"), "left alone"),
    Break(Site(COLLECTIVES, "_reduce_scatter", "dist.reduce_scatter_single"), "erased"),
    Break(Site(COLLECTIVES, "_exchange_and_add", "dist.all_to_all_single"), "erased"),
]
CONTROLS = [Break(site, "nothing") for site in (GATHER, FORTH, ADD)]
# What other backends than gloo use: with equal pieces gloo can do it as well.
PIECES = [
    Break(Site(REDUCE, "_reduce_scatter", "dist.reduce_scatter"), "left alone"),
    Break(Site(REDUCE, "_all_gather", "dist.all_gather"), "left alone"),
]
Verdicts = dict[Break, tuple[Report, int]]


def make_case(ranks: int) -> Case:
    """One step; tp and ep over the same two ranks, and dp over as many such pairs as there are.

    Sizes divide by tp: the same message then fits every group, and only its numbers are wrong."""
    return Case(
        topology=Topology(dp=ranks // 2, tp=2, ep=2),
        model=make_config(num_layers=1, dense_layers=0, vocab_size=20, moe={"ffn": 6}),
        optimizer=OptimizerConfig(lr=1e-3, clip=0.3),
        steps=1,
    )


def prove_broken(rank: int, world: int, breaks: list[Break]) -> Verdicts:
    """Every break on its own, and how often the broken call was made."""
    case, verdicts = make_case(world), {}
    mesh, reference = Mesh(case.topology, torch.device("cpu")), trace_plain(case)
    for broken in breaks:
        scatters = dict(collectives.SUM_SCATTER)
        if broken.site.function == "_reduce_scatter":
            collectives.SUM_SCATTER.clear()
        with planted(broken, mesh) as hits:
            verdicts[broken] = (prove(case, mesh, reference), len(hits))
        collectives.SUM_SCATTER.update(scatters)
    return verdicts


def move_pieces(rank: int, world: int, broken: Break) -> list[float]:
    """Rank r has [r + 1, r + 1, ...]: the sum in its own piece, and a copy of the others' pieces."""
    mesh = Mesh(Topology(dp=world), torch.device("cpu"))
    group, pieces = mesh.group(Axis.stage, Traffic.data), [range(2 * r, 2 * r + 2) for r in range(world)]
    reduce.METHODS.clear()
    with planted(broken, mesh):
        summed, copied = (torch.full((2 * world,), rank + 1.0) for _ in range(2))
        reduce.reduce_pieces(summed, pieces, group)()
        reduce.gather_pieces(copied, pieces, group)()
    return [*summed[2 * rank : 2 * rank + 2].tolist(), *copied.tolist()]


def name(broken: Break) -> str:
    return f"{broken.site.function}-{broken.site.callee}{broken.site.index}-{broken.kind}"


@pytest.fixture(scope="module")
def verdicts() -> Verdicts:
    found: Verdicts = {}
    for ranks in (2, 4):
        found |= run_ranks(prove_broken, ranks, [b for b in BREAKS + CONTROLS if b.ranks == ranks])[0]
    return found


@pytest.mark.parametrize("broken", BREAKS, ids=name)
def test_the_proof_notices(broken: Break, verdicts: Verdicts) -> None:
    report, calls = verdicts[broken]
    assert calls, "the call was never made"
    assert not report.passed, report


@pytest.mark.parametrize("control", CONTROLS, ids=name)
def test_a_planted_call_that_works_passes(control: Break, verdicts: Verdicts) -> None:
    report, calls = verdicts[control]
    assert calls and report.passed, report


@pytest.mark.parametrize("broken", PIECES, ids=name)
def test_pieces_move_by_other_backends(broken: Break) -> None:
    right = [[3.0, 3.0, 1.0, 1.0, 2.0, 2.0]] * 2
    assert run_ranks(move_pieces, 2, broken._replace(kind="nothing")) == right
    assert all(moved != right[0] for moved in run_ranks(move_pieces, 2, broken))


def test_every_collective_has_a_break() -> None:
    planned = {broken.site for broken in BREAKS + PIECES}
    assert planned == set(find_sites())
    assert {broken.kind for broken in BREAKS + CONTROLS + PIECES} == set(KINDS)
