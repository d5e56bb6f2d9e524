"""Every layout gives the plain model's numbers: loss, gradients, norm, routing, counts and the weights after steps."""

import itertools
import random
from typing import Any

import pytest
from layouts import (
    CHOICES,
    PIPED,
    describe,
    describe_attention,
    describe_router,
    draw_choice,
    draw_layouts,
    pairs,
    split,
)
from proved import check

from model.config import Recompute
from training.proof.case import Case

FEW = draw_layouts(seed=0, count=24, ranks=range(2, 5), most_tp=2)
MANY = draw_layouts(seed=1, count=60, ranks=range(2, 9), most_tp=8)
FEW_PIPED = draw_layouts(seed=2, count=22, ranks=range(2, 5), most_tp=2, stages=range(2, 5))
MANY_PIPED = draw_layouts(seed=3, count=60, ranks=range(2, 9), most_tp=4, stages=range(2, 5))
FOLDED = draw_layouts(seed=4, count=8, ranks=range(1, 5), most_tp=2, stages=range(1, 2))  # all stages on one rank


@pytest.mark.parametrize("case", FEW + FEW_PIPED, ids=describe)
def test_layout_equals_the_plain_model(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MANY + MANY_PIPED + FOLDED, ids=describe)
def test_layout_equals_the_plain_model_on_up_to_eight_ranks(case: Case) -> None:
    check(case)


def choices(case: Case) -> dict[str, Any]:
    """What ``make_case`` was given, read back from the case."""
    model, moe = case.model, case.model.moe
    pipeline = case.pipeline
    piped = {
        "virtual": pipeline.virtual,
        "divided": "by cost" if pipeline.layers is None else "as drawn",
        "spare": model.num_layers - len(case.stages.layers),
    }
    return {
        **(piped if len(case.stages.layers) > 1 else {}),
        "topology": case.topology,
        "schedule": pipeline.schedule,
        "pieces": case.overlap.pieces,
        "overlapped": case.overlap.experts,
        "engine": case.engine,
        "tensor": case.overlap.tensor,
        "shared": moe.shared_experts,
        "router": describe_router(moe),
        "mtp": model.mtp.depth,
        "recompute": model.recompute,
        "accumulation": case.accumulation,
        "micro_batch": case.micro_batch,
        "crowded": case.crowded,
        "rebalance": case.rebalance,
        "attention": describe_attention(model.attention),
        "tied": model.tied,
        "dense": "every other" if moe.every > 1 else model.dense_layers,
        "documents": case.documents,
        "clip": case.optimizer.clip,
    }


@pytest.mark.parametrize(("cases", "share"), [(FEW_PIPED, 0.88), (MANY_PIPED, 0.99)])
def test_drawn_pipelines_meet_in_pairs(cases: list[Case], share: float) -> None:
    """Of all pairs that any draw could have."""
    generator, worlds = random.Random(0), {case.topology.world for case in cases}  # noqa: S311 (no secret)
    most = max(case.topology.tp for case in cases)
    topologies = [t for world in worlds for t in split(world) if t.tp <= most and t.pp in range(2, 5)]
    possible = set[Any]().union(*(pairs(draw_choice(generator, topologies, PIPED)) for _ in range(2000)))
    drawn = set[Any]().union(*(pairs(choices(case)) for case in cases))
    assert len(drawn & possible) >= share * len(possible)
    for name, options in PIPED.items():
        assert {choices(case)[name] for case in cases} == set(options), name
    assert all(case.accumulation >= 3 and case.topology.pp > 1 for case in cases)


@pytest.mark.parametrize(("cases", "share"), [(FEW, 0.9), (MANY, 0.99)])
def test_drawn_layouts_meet_in_pairs(cases: list[Case], share: float) -> None:
    """Of all pairs of choices, and of a choice with an axis that splits or does not, nearly all are drawn."""
    drawn = set[Any]().union(*(pairs(choices(case)) for case in cases))
    values = [{(name, value) for pair in drawn for name, value in pair if name == wanted} for wanted in CHOICES]
    for name, found in zip(CHOICES, values, strict=True):
        assert {value for _, value in found} == set(CHOICES[name]), name
    refused = len(Recompute) - 1 + 2  # fsdp2 with each kind of recomputation, with moving experts and with pairs
    refused += 2 + 2  # without experts, none crowded and none moving; and no pieces
    possible = sum(len(a) * len(b) for a, b in itertools.combinations(values, 2)) - refused
    covered = sum(1 for (a, _), (b, _) in drawn if a in CHOICES and b in CHOICES)
    assert covered >= share * possible
    for axis in ("dp", "tp", "ep", "edp", "folded"):
        met = {pair for pair in drawn if (axis, True) in pair}
        for name, options in CHOICES.items():
            if axis in ("ep", "folded"):
                options = [option for option in options if option != "none"]
            assert all(tuple(sorted(((axis, True), (name, value)))) in met for value in options), (axis, name)
