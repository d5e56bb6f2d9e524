"""Which models and batches a layout takes: every rule refused by its key, and everything that divides accepted."""

from dataclasses import replace
from typing import Any

import pytest

from configs.schema import TrainConfig
from launcher.compose import Composer
from model.config import AttentionConfig, ModelConfig, MoEConfig
from parallel.config import EngineName, ParallelConfig, PipelineConfig, ScheduleName
from parallel.pipeline.schedules import SCHEDULES
from parallel.rules import check, check_model, check_tiles
from parallel.topology import Topology, arrange
from training.ramp import batch_sizes, schedule_batches

COMPOSER = Composer()
MODEL = ModelConfig(
    name="rules", vocab_size=301, num_layers=3, dense_layers=1, hidden=48, ffn=50,
    attention=AttentionConfig(heads=12, kv_rank=8, nope_dim=4, rope_dim=4, v_dim=4),
    moe=MoEConfig(experts=30, top_k=2, ffn=7, shared_experts=1),
)  # fmt: skip
LENGTH = 60


def compose(*overrides: str) -> TrainConfig:
    return COMPOSER.compose(overrides)[0]


WIDE = ModelConfig(
    name="tiles", vocab_size=301, num_layers=3, dense_layers=1, hidden=200, ffn=512,
    attention=AttentionConfig(heads=8, kv_rank=100, nope_dim=64, rope_dim=32, v_dim=64),
    moe=MoEConfig(experts=30, top_k=2, ffn=256, shared_experts=2),
)  # fmt: skip


def test_tp_cuts_between_tiles() -> None:
    """Widths that tp cuts: 768, 1024, 512, 512 and 512, and sequences of 1024."""
    for tp, tile in ((1, 128), (1, 100), (2, 128), (4, 64), (4, 32), (8, 32)):
        check_tiles(WIDE, 1024, tp, tile)
    for changed, says in (
        (replace(WIDE, ffn=500), r"cut model\.ffn = 500 into multiples of 128, and 250 is none: .* cut: 256, 512"),
        (replace(WIDE, attention=replace(WIDE.attention, v_dim=48)), r"nope_dim \+ v_dim\) = 896 .* 448 is none"),
        (replace(WIDE, moe=replace(WIDE.moe, ffn=100)), r"ffn \* shared_experts = 200 .* 100 is none"),
    ):
        with pytest.raises(ValueError, match=rf"^parallel\.tp=2 must .*{says}"):
            check_tiles(changed, 1024, 2, 128)
    with pytest.raises(ValueError, match=r"^parallel\.tp=2 must cut data.sequence_length = 320 .* cut: 256, 512"):
        check_tiles(WIDE, 320, 2, 128)
    grouped = AttentionConfig(heads=8, kv_heads=2, nope_dim=0, rope_dim=32, v_dim=32)
    check_tiles(replace(WIDE, attention=grouped), 1024, 2, 64)
    with pytest.raises(ValueError, match=r"kv_heads = 384 into multiples of 128, and 192 is none"):
        check_tiles(replace(WIDE, attention=grouped), 1024, 2, 128)
    check_tiles(replace(WIDE, dense_layers=0, ffn=500, moe=replace(WIDE.moe, shared_experts=0)), 1024, 2, 128)


def test_a_layout_is_taken_exactly_when_everything_divides() -> None:
    taken = 0
    for tp in range(1, 9):
        for dp in range(1, 9):
            for ep in (ep for ep in range(1, dp * tp + 1) if dp * tp % ep == 0):
                fits = 12 % tp == 0 and 30 % ep == 0 and LENGTH % tp == 0 and 24 % dp == 0
                topology = Topology(dp=dp, tp=tp, ep=ep)
                taken += fits
                if fits:
                    check(MODEL, LENGTH, [24], topology)
                else:
                    with pytest.raises(ValueError, match=r"^(parallel|data|run)\."):
                        check(MODEL, LENGTH, [24], topology)
    assert taken > 50


def test_uneven_vocabulary_and_widths_are_taken() -> None:
    """301 rows, widths 50 and 7 over 4 ranks: nothing divides."""
    check(MODEL, LENGTH, [8], Topology(dp=2, tp=4, ep=2))


def test_heads() -> None:
    with pytest.raises(
        ValueError, match=r"^parallel\.tp=5 must divide model\.attention\.heads=12: .* nearest that do: 4, 6$"
    ):
        check(MODEL, LENGTH, [8], Topology(tp=5))
    with pytest.raises(ValueError, match=r"^parallel\.tp=24 .* nearest that do: 12$"):
        check(MODEL, LENGTH, [8], Topology(tp=24))


def test_experts() -> None:
    with pytest.raises(
        ValueError, match=r"^parallel\.ep=4 must divide model\.moe\.experts=30: .* nearest that do: 3, 5$"
    ):
        check(MODEL, LENGTH, [8], Topology(dp=8, ep=4))
    dense = replace(MODEL, moe=MoEConfig())
    check(dense, LENGTH, [8], Topology(dp=2, tp=4))
    with pytest.raises(ValueError, match=r"^parallel\.ep=2 must be 1: with model\.moe\.experts=0 there are no"):
        check(dense, LENGTH, [8], Topology(dp=2, ep=2))


def test_sequences() -> None:
    with pytest.raises(
        ValueError,
        match=r"^data\.sequence_length=62 must be divisible by parallel\.cp\*tp = 1\*4 = 4: .* that are: 60, 64$",
    ):
        check(MODEL, 62, [8], Topology(tp=4))
    with pytest.raises(ValueError, match=r"^data\.sequence_length=4 .* parallel\.cp\*tp = 2\*6 = 12: .* that are: 12$"):
        check(MODEL, 4, [8], Topology(cp=2, tp=6))


def test_batches() -> None:
    check(MODEL, LENGTH, [3, 6, 9], Topology(dp=3))
    with pytest.raises(
        ValueError, match=r"^run\.global_batch=8 must be divisible by parallel\.dp=3: .* that are: 6, 9$"
    ):
        check(MODEL, LENGTH, [3, 8], Topology(dp=3))
    with pytest.raises(
        ValueError, match=r"^run\.ramp makes a batch of 4, which must .* parallel\.dp=3: .* run\.ramp\.start and run\."
    ):
        check(MODEL, LENGTH, [3, 4, 9], Topology(dp=3))
    with pytest.raises(ValueError, match=r"^run\.global_batch=2 .* that are: 4$"):
        check(MODEL, LENGTH, [2], Topology(dp=4))


def test_what_dp_does_not_change_is_checked_without_it() -> None:
    check_model(MODEL, LENGTH, ParallelConfig(tp=4, ep=3))
    for broken in (ParallelConfig(tp=8), ParallelConfig(ep=4)):
        with pytest.raises(ValueError, match=r"^parallel\.(tp=8|ep=4) must divide model\."):
            check_model(MODEL, LENGTH, broken)


def test_a_configuration_is_checked_as_it_is_composed() -> None:
    assert compose("parallel.dp=4", "parallel.tp=2", "parallel.ep=8").parallel == ParallelConfig(dp=4, tp=2, ep=8)
    with pytest.raises(ValueError, match=r"^run\.global_batch=8 must be divisible by parallel\.dp=16"):
        compose("parallel.dp=16")
    with pytest.raises(ValueError, match=r"^run\.ramp makes a batch of 2, which must be divisible by parallel\.dp=4"):
        compose("parallel.dp=4", "run.micro_batch=2", "run.ramp.start=2")
    with pytest.raises(ValueError, match=r"^parallel\.ep=4 must divide dp\*cp\*tp = 2\*1\*1 = 2"):
        compose("parallel.dp=2", "parallel.ep=4")


def test_an_open_dp_is_checked_once_the_ranks_are_known() -> None:
    """``parallel.ep=4`` alone may be right or wrong: that depends on how many ranks there are."""
    config = compose("parallel.ep=4")
    batches = batch_sizes(config.run)
    check(config.model, config.data.sequence_length, batches, arrange(8, ep=4))
    with pytest.raises(ValueError, match=r"^run\.global_batch=8 must be divisible by parallel\.dp=16"):
        check(config.model, config.data.sequence_length, batches, arrange(16, ep=4))


def test_the_sizes_checked_are_those_trained_on() -> None:
    for words in ((), ("run=deepseek_v3",), ("run.micro_batch=1", "run.ramp={start: 2, tokens: 9000, jump: 3}")):
        run = compose(*words).run
        assert list(batch_sizes(run)) == [level.batch for level in schedule_batches(run, 256).levels]


def test_axes_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^parallel\.cp=2 must be 1: there is no context parallelism yet$"):
        ParallelConfig(cp=2)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("engine", [engine for engine in EngineName if engine is not EngineName.zero3])  # on one stage
def test_engines_take_schedules_of_whole_backwards(engine: EngineName, name: str) -> None:
    pipeline = PipelineConfig(schedule=ScheduleName(name))
    if engine is EngineName.native or name in ("gpipe", "1f1b", "eager_1f1b", "interleaved_1f1b"):
        assert ParallelConfig(pp=2, engine=engine, pipeline=pipeline).pp == 2
    else:
        taken = "gpipe, 1f1b, eager_1f1b, interleaved_1f1b"
        refused = rf"^parallel\.pipeline\.schedule={name} must be one of {taken} with .*={engine}"
        with pytest.raises(ValueError, match=refused):
            ParallelConfig(pp=2, engine=engine, pipeline=pipeline)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ({"ep": 2}, "interleaved_1f1b_overlap"),
        ({"ep": 2, "pp": 2}, "1f1b"),
        ({"ep": 2, "pp": 2, "virtual": 2}, "interleaved_1f1b_overlap"),
        ({"ep": 2, "engine": EngineName.fsdp2}, "1f1b"),
        ({"ep": 2, "schedule": ScheduleName("gpipe")}, "gpipe"),
        ({"pp": 2, "virtual": 2}, "interleaved_1f1b"),
        ({}, "1f1b"),
    ],
)
def test_the_schedule_suits_the_layout(layout: dict[str, Any], name: str) -> None:
    pipeline = {key: layout.pop(key) for key in ("schedule", "virtual") if key in layout}
    assert ParallelConfig(**layout, pipeline=PipelineConfig(**pipeline)).schedule == name


def test_the_engine_is_named() -> None:
    assert compose().parallel.engine is EngineName.native
    with pytest.raises(ValueError, match=r"^parallel\.engine=none must be one of native"):
        compose("parallel.engine=none")
