"""Layouts in FP8 against the plain model in FP8: in float64, rounding and all; and what travels in 8 bits."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from layouts import describe
from proved import check
from small_models import GROUPED, make_config
from spawn import run_ranks

import parallel.collectives
import parallel.exchange
import training.proof.company
from model.config import ModelConfig
from model.exchange import LocalExchange
from model.fp8 import DEEPSEEK_V3, MXFP8, Recipe, Scaling
from parallel.config import EngineName, OverlapConfig, PipelineConfig, ScheduleName
from parallel.exchange import ExpertExchange
from parallel.mesh import Mesh
from parallel.topology import Topology
from parallel.wire import Rounded
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.prove import prove

Layout = dict[str, int]


def make_model(**other: Any) -> ModelConfig:
    """tp=2 cuts every width between tiles of 128."""
    attention = {"heads": 4, "q_rank": 130, "kv_rank": 100, "nope_dim": 64, "rope_dim": 64, "v_dim": 64}
    moe = {"experts": 6, "ffn": 256, "groups": 3, "pad": 32}
    return make_config(**{"attention": attention, "moe": moe, "hidden": 128, "ffn": 256, "num_layers": 2, **other})


# Per rank of tp=2: a head of keys and values in whole tiles; two of them, each of a tile and a half.
NORMED = GROUPED | {"heads": 4, "kv_heads": 2, "rope_dim": 128, "v_dim": 128, "qk_norm": True}
BIASED = GROUPED | {"heads": 4, "kv_heads": 4, "rope_dim": 32, "v_dim": 64, "nope_dim": 32, "bias": True}


def make_case(layout: Layout, schedule: str = "1f1b", recipe: Recipe = DEEPSEEK_V3, **other: Any) -> Case:
    return Case(
        topology=Topology(**layout),
        model=other.pop("model", make_model()),
        optimizer=OptimizerConfig(lr=1e-3, clip=0.3),
        recipe=recipe,
        pipeline=PipelineConfig(schedule=ScheduleName(schedule)),
        length=128 * layout.get("tp", 1),
        steps=2,
        **other,
    )


SPREAD, FOLDED = {"dp": 2, "ep": 2}, {"tp": 2, "ep": 2}
FEW = [
    make_case(
        SPREAD,
        "interleaved_1f1b_overlap",
        model=make_model(recompute="selective"),
        overlap=OverlapConfig(pieces=2),
        micro_batch=2,
    ),
    make_case(FOLDED, recipe=MXFP8, model=make_model(mtp=1)),
    make_case({"tp": 2}, model=make_model(attention=NORMED), accumulation=2),
]
MANY = [
    make_case({}),
    make_case(FOLDED, model=make_model(attention=BIASED, recompute="selective")),
    make_case({"dp": 2}, crowded=True),
    make_case(SPREAD, engine=EngineName.fsdp2),
    make_case(SPREAD, engine=EngineName.zero1, accumulation=1),
    make_case({"dp": 2, "tp": 2, "ep": 2}, micro_batch=2, overlap=OverlapConfig(tensor="joined")),
    make_case({"dp": 2, "tp": 2, "ep": 4}, model=make_model(moe={"experts": 8, "ffn": 256, "groups": 4, "pad": 32})),
    make_case({"pp": 2, "tp": 2}, "zb_h1", accumulation=4, model=make_model(num_layers=3)),
    make_case({"pp": 2, "dp": 2, "ep": 2}, "dualpipev", accumulation=4, model=make_model(num_layers=4, mtp=1)),
    make_case(SPREAD, rebalance=True, model=make_model(recompute="full")),
    make_case(SPREAD, recipe=DEEPSEEK_V3._replace(gradients=Scaling((1, 128), powers=True)), documents=False),
]
MANY[3] = replace(MANY[3], steps=1)  # later ones start from weights that were rounded to float32


@pytest.mark.parametrize("case", FEW, ids=describe)
def test_layout_equals_the_plain_model_in_fp8(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", MANY, ids=describe)
def test_more_layouts_equal_the_plain_model_in_fp8(case: Case) -> None:
    check(case)


class Alone:
    """In place of ``Together``: every expert's rows in one run."""

    def __new__(cls, experts: int, tile: int, companies: Any) -> Any:
        return LocalExchange(experts, tile)


def prove_broken(rank: int, world: int, fault: str) -> list[str]:
    case = make_case(SPREAD, accumulation=1)
    if fault == "scales lose digits on the wire":
        parallel.exchange.choose_wire = lambda _: Rounded(DEEPSEEK_V3.activations)  # type: ignore[assignment]
    elif fault == "tokens of other companies share scales":
        case = make_case({"dp": 2}, accumulation=1)
        training.proof.company.Together = Alone  # type: ignore[assignment,misc]
    elif fault == "a tile on two ranks":
        # Every width is cut inside a tile; the rule that refuses it is the configuration's.
        narrow = make_model(attention={"heads": 2, "nope_dim": 64, "rope_dim": 32, "v_dim": 32})
        case = make_case({"tp": 2}, model=narrow, accumulation=1)
    report = prove(replace(case, steps=1), Mesh(case.topology, torch.device("cpu")))
    return [row.what for row in report.rows if not row.passed]


NOTICED = {
    "nothing": [],
    "scales lose digits on the wire": ["loss", "gradients"],
    "tokens of other companies share scales": ["gradients"],
    "a tile on two ranks": ["loss", "gradients"],
}


@pytest.mark.parametrize(("fault", "rows"), NOTICED.items(), ids=NOTICED)
def test_what_is_quantised_otherwise_is_noticed(fault: str, rows: list[str]) -> None:
    for found in run_ranks(prove_broken, 2, fault):
        assert set(rows) <= set(found) and bool(rows) == bool(found)
        assert ("loss" in found) == ("loss" in rows)


def count_bytes(rank: int, world: int, width: int, choices: int, wired: bool) -> list[int]:
    """Bytes of each message of a dispatch, of what comes back, and of their gradients."""
    sizes: list[int] = []
    plain = parallel.collectives.all_to_all

    def watch(rows: torch.Tensor, *others: Any) -> Any:
        sizes.append(rows.nbytes)
        return plain(rows, *others)

    mesh = Mesh(Topology(dp=world, ep=world), torch.device("cpu"))
    wanted = DEEPSEEK_V3.activations.rounded(), DEEPSEEK_V3.gradients.rounded()
    exchange = ExpertExchange(16, 32, mesh, wanted=wanted if wired else (None, None))
    tokens = torch.randn(64, width).bfloat16().requires_grad_()
    experts = torch.stack([torch.randperm(16)[:choices] for _ in range(64)])
    gates = torch.rand(64, choices).requires_grad_()
    announced = exchange.announce(experts)
    parallel.collectives.all_to_all = watch  # type: ignore[assignment]
    parallel.exchange.all_to_all = watch  # type: ignore[assignment]
    (shipped,) = exchange.dispatch(tokens, gates, announced)
    arrived = exchange.arrive(shipped)
    back = exchange.collect(exchange.combine((arrived.tokens, arrived.layout)))
    back.float().sum().backward()
    assert exchange.take_travelled()[0] == 64
    return sizes


def test_tokens_and_gradients_of_outputs_travel_in_eight_bits() -> None:
    """With DeepSeek-V3's width and choices, gates and slots and scales included; what comes back stays in BF16."""
    (wide, *_), (narrow, *_) = (run_ranks(count_bytes, 2, 7168, 8, wired) for wired in (False, True))
    out, back, gradients, home = (ours / theirs for ours, theirs in zip(narrow, wide, strict=True))
    assert out <= 0.53 and gradients <= 0.53
    assert back == home == 1
