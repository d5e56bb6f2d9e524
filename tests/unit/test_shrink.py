"""What a proof keeps of a user's configuration, what it shrinks, and what it says it has not proved."""

from pathlib import Path
from typing import Any

import pytest
from small_models import GROUPED, make_config
from small_runs import make_run

from parallel.config import EngineName, OverlapConfig, ParallelConfig, PipelineConfig, ScheduleName, TensorOverlap
from parallel.pipeline.schedules import SCHEDULES
from parallel.rules import check_tiles
from parallel.topology import Topology
from training.config import TILES, Precision
from training.determinism import NUMERICS
from training.proof.lower import RANKS, list_lengths, lower
from training.proof.shrink import shrink, shrink_model


def test_keeps_what_layouts_can_get_wrong() -> None:
    model = make_config(num_layers=9, dense_layers=3, hidden=768, ffn=1003, vocab_size=50257, mtp=2, tied=True)
    small = shrink_model(model, 4)
    assert (small.num_layers, small.dense_layers, small.mtp, small.tied) == (2, 1, model.mtp, True)
    assert small.attention.heads == model.attention.heads
    for field in ("experts", "top_k", "groups", "top_groups", "shared_experts", "score", "gate_scale", "aux_alpha"):
        assert getattr(small.moe, field) == getattr(model.moe, field)
    for field in ("hidden", "ffn", "vocab_size"):
        assert getattr(small, field) < 24 and getattr(small, field) % 4 == getattr(model, field) % 4


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_keeps_one_layer_of_each_kind(dense: int) -> None:
    small = shrink_model(make_config(num_layers=3, dense_layers=dense), 2)
    kinds = {small.is_moe(layer) for layer in range(small.num_layers)}
    assert kinds == {0: {True}, 1: {False, True}, 3: {False}}[dense]


def test_keeps_grouped_attention_and_one_layer_of_each_kind_wherever_they_are() -> None:
    grouped = GROUPED | {"bias": True, "qk_norm": True}
    small = shrink_model(
        make_config(num_layers=6, dense_layers=0, attention=grouped, moe={"every": 3, "skip": (5,)}), 2
    )
    assert [small.is_moe(layer) for layer in range(small.num_layers)] == [False, True]
    a = small.attention
    assert (a.heads, a.kv_heads, a.qk_norm, a.bias, a.kv_rank) == (6, 2, True, True, None)


@pytest.mark.parametrize(
    ("given", "proved", "said"),
    [
        ({"dp": 4, "tp": 2, "ep": 4}, {"dp": 4, "tp": 2, "ep": 4}, []),
        ({"dp": 64, "tp": 2, "ep": 4}, {"dp": 8, "tp": 2, "ep": 4}, ["parallel.dp=64: proved with 8"]),
        (
            {"dp": 64, "ep": 64},
            {"dp": 16, "ep": 16},
            ["parallel.dp=64: proved with 16", "parallel.ep=64: proved with 16"],
        ),
        (
            {"dp": 64, "ep": 32},
            {"dp": 16, "ep": 8},
            ["parallel.dp=64: proved with 16", "parallel.ep=32: proved with 8"],
        ),
    ],
)
def test_lowers_dp_first_and_says_so(given: dict[str, int], proved: dict[str, int], said: list[str]) -> None:
    small, unproved = lower(Topology(**given), experts=256)
    assert small == Topology(**proved) and unproved == said
    assert small.world <= RANKS and (small.edp > 1) == (Topology(**given).edp > 1)


def test_cases_of_a_run(tmp_path: Path) -> None:
    config = make_run(tmp_path, data={"mask_documents": True}, global_batch=16, micro_batch=4)
    shrunk = shrink(config, Topology(dp=2, tp=2))
    spread, crowded = shrunk.cases.values()
    assert (spread.crowded, crowded.crowded) == (False, True)
    assert (spread.micro_batch, spread.accumulation, spread.length, spread.documents) == (2, 2, 8, True)


def test_experts_move_where_the_run_moves_them(tmp_path: Path) -> None:
    config: Any = make_run(tmp_path)
    for every in (0, 50):
        config.parallel = ParallelConfig(ep=2, rebalance_every=every)
        cases = shrink(config, Topology(dp=2, ep=2)).cases
        assert [case.rebalance for case in cases.values()] == [every > 0] * 2
        assert all(("change ranks" in name) == (every > 0) for name in cases)


@pytest.mark.parametrize("engine", EngineName)
def test_keeps_the_engine(tmp_path: Path, engine: EngineName) -> None:
    config: Any = make_run(tmp_path)
    config.parallel = ParallelConfig(engine=engine)
    assert {case.engine for case in shrink(config, Topology(dp=2)).cases.values()} == {engine}


def test_what_only_devices_run_is_proved_as_what_a_processor_has(tmp_path: Path) -> None:
    config: Any = make_run(tmp_path)
    for wanted, proved in (("auto", "auto"), ("joined", "joined"), ("fused", "blocks")):
        config.parallel = ParallelConfig(tp=2, overlap=OverlapConfig(tensor=TensorOverlap(wanted)))
        cases, unproved = shrink(config, Topology(tp=2))
        assert {case.overlap.tensor for case in cases.values()} == {proved}
        assert ["parallel.overlap.tensor=fused" in line for line in unproved] == [True] * (wanted == "fused")


def test_learning_rates_and_sizes_share_a_proof(tmp_path: Path) -> None:
    small = make_run(tmp_path, model=make_config(hidden=12, ffn=10, vocab_size=264), global_batch=16)
    large = make_run(
        tmp_path, model=make_config(hidden=48, ffn=50, vocab_size=1000), optimizer={"lr": 2e-2}, global_batch=32
    )
    assert shrink(small, Topology(dp=2)) == shrink(large, Topology(dp=2))
    assert shrink(small, Topology(dp=2)) != shrink(small, Topology(dp=2, ep=2))


@pytest.mark.parametrize("precision", TILES)
@pytest.mark.parametrize("heads", [2, 8, 128])
def test_in_fp8_tp_cuts_between_tiles(tmp_path: Path, precision: Precision, heads: int) -> None:
    config: Any = make_run(
        tmp_path, model=make_config(vocab_size=264, attention={"heads": heads}, mtp=1), precision=precision
    )
    for tp in (1, 2):
        config.parallel = ParallelConfig(tp=tp)
        for case in shrink(config, Topology(dp=2, tp=tp)).cases.values():
            assert case.recipe == NUMERICS[precision].recipe
            check_tiles(case.model, case.length, tp, TILES[precision])
            assert case.model.attention.heads == heads


def test_what_deepspeed_rounds_is_not_proved(tmp_path: Path) -> None:
    config: Any = make_run(tmp_path, precision=Precision.fp8)
    config.parallel = ParallelConfig(engine=EngineName.zero1)
    cases, unproved = shrink(config, Topology(dp=2))
    assert {case.steps for case in cases.values()} == {1}
    assert [line.split(":")[0] for line in unproved] == ["steps after the first"]


def test_what_is_too_large_for_a_machine_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.tp=32 must be at most 16 .* verify=skip trains without"):
        lower(Topology(tp=32), experts=0)


@pytest.mark.parametrize(("stages", "layers"), [(2, 3), (3, 4), (8, 9), (9, 9)])
@pytest.mark.parametrize("dense", [0, 3, 9])
def test_keeps_a_layer_a_stage_and_one_over(stages: int, layers: int, dense: int) -> None:
    """One over, so that stages are uneven, where the model has it; both kinds of layers, where it has them."""
    small = shrink_model(make_config(num_layers=9, dense_layers=dense), 2, stages)
    assert small.num_layers == layers
    assert {small.is_moe(layer) for layer in range(layers)} == {0: {True}, 3: {False, True}, 9: {False}}[dense]


@pytest.mark.parametrize("name", ScheduleName)
@pytest.mark.parametrize(("batch", "pp"), [(8, 2), (8, 4), (10, 4), (64, 4)])
def test_keeps_schedule_stages_and_remainder(tmp_path: Path, name: ScheduleName, batch: int, pp: int) -> None:
    virtual = 3 if SCHEDULES[name].virtual else 1
    config: Any = make_run(
        tmp_path, model=make_config(num_layers=20, vocab_size=264), global_batch=batch, micro_batch=1
    )
    config.parallel = ParallelConfig(pp=pp, pipeline=PipelineConfig(schedule=name, virtual=virtual))
    for case in shrink(config, Topology(pp=pp)).cases.values():
        assert (case.topology.pp, case.pipeline) == (pp, PipelineConfig(schedule=name, virtual=virtual))
        assert len(case.stages.layers) == SCHEDULES[name].stages(pp, virtual)
        assert case.model.num_layers == len(case.stages.layers) + 1
        assert case.accumulation >= max(3, 2 * pp) and case.accumulation % pp == batch % pp


def test_a_division_of_layers_is_not_of_the_class(tmp_path: Path) -> None:
    config: Any = make_run(tmp_path, model=make_config(num_layers=9, vocab_size=264), micro_batch=1)
    found = []
    for layers in (None, (4, 5)):
        config.parallel = ParallelConfig(pp=2, pipeline=PipelineConfig(layers=layers))
        found.append(shrink(config, Topology(pp=2)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("given", "schedule", "proved"),
    [
        ({"pp": 8, "dp": 2, "ep": 2}, "1f1b", {"pp": 8, "dp": 2, "ep": 2}),
        ({"pp": 16, "dp": 128, "ep": 64}, "dualpipe", {"pp": 4, "dp": 4, "ep": 2}),
        ({"pp": 32}, "zb_v", {"pp": 16}),
        ({"pp": 4, "dp": 64}, "1f1b", {"pp": 4, "dp": 4}),
        ({"pp": 4, "tp": 8}, "1f1b", {"pp": 2, "tp": 8}),
        ({"pp": 3, "tp": 8}, "1f1b", {"pp": 2, "tp": 8}),
        ({"pp": 4, "dp": 8, "tp": 4, "ep": 8}, "zb_h1", {"pp": 2, "dp": 2, "tp": 4, "ep": 4}),
    ],
)
def test_lowers_a_pipeline_and_says_so(given: dict[str, int], schedule: str, proved: dict[str, int]) -> None:
    lengths = list_lengths(ParallelConfig(pp=given["pp"], pipeline=PipelineConfig(schedule=ScheduleName[schedule])))
    small, unproved = lower(Topology(**given), 256, lengths)
    assert small == Topology(**proved) and small.world <= RANKS
    assert unproved == [
        f"parallel.{axis}={given[axis]}: proved with {proved[axis]}"
        for axis in ("pp", "dp", "ep")
        if given.get(axis, 1) != proved.get(axis, 1)
    ]


def test_a_pipeline_that_cannot_be_shortened_is_refused() -> None:
    own = list_lengths(ParallelConfig(pp=17, pipeline=PipelineConfig(file="mine.txt")))
    with pytest.raises(ValueError, match=r"parallel\.pp=17 must be at most 16 .* schedule of your own; verify=skip"):
        lower(Topology(pp=17), 0, own)
    with pytest.raises(ValueError, match=r"parallel\.tp=16 must be at most 8 .* with a pipeline; verify=skip"):
        lower(Topology(pp=2, tp=16), 0, (2,))
