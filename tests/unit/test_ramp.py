"""Batch sizes, the data cursor and micro-batches as pure functions of the step."""

import pytest

from training.config import RampConfig, RunSection
from training.ramp import Level, schedule_batches


def section(**changes: object) -> RunSection:
    return RunSection(**{"name": "test", "steps": 10, "global_batch": 8, "micro_batch": 2, **changes})


def test_without_a_ramp_every_step_is_alike() -> None:
    schedule = schedule_batches(section(), sequence_length=16)
    assert [schedule.size(step) for step in range(5)] == [8] * 5
    assert [schedule.before(step) for step in range(5)] == [0, 8, 16, 24, 32]
    assert schedule.plan(2, 3) == [(16, 3), (19, 3), (22, 2)]


def test_replicas_share_a_step() -> None:
    """The same sequences as one process reads, each once; all replicas run alike."""
    ramp = RampConfig(start=4, jump=4, tokens=500)
    schedule = schedule_batches(section(global_batch=12, micro_batch=2, ramp=ramp), sequence_length=7)
    for step in range(30):
        expected = range(schedule.before(step), schedule.before(step + 1))
        for replicas, micro_batch in ((1, 2), (2, 2), (4, 1), (2, 3), (4, 8)):
            plans = [schedule.plan(step, micro_batch, replicas, replica) for replica in range(replicas)]
            for stretch in zip(*plans, strict=True):
                assert len({count for _, count in stretch}) == 1 and stretch[0][1] <= micro_batch
            read = [at + i for stretch in zip(*plans, strict=True) for at, count in stretch for i in range(count)]
            assert read == list(expected)


def test_ramp_grows_with_the_tokens_seen() -> None:
    """start 2, full 8, jump 2 over 96 sequences: 4 is due at 32, 6 at 64, 8 at 96 sequences."""
    ramp = RampConfig(start=2, tokens=96 * 16)
    schedule = schedule_batches(section(ramp=ramp), sequence_length=16)
    assert schedule.levels == (Level(0, 0, 2), Level(16, 32, 4), Level(24, 64, 6), Level(30, 100, 8))


def test_cursor_is_the_prefix_sum() -> None:
    ramp = RampConfig(start=4, jump=2, tokens=1000)
    schedule = schedule_batches(section(global_batch=12, ramp=ramp), sequence_length=7)
    seen = 0
    for step in range(80):
        assert schedule.before(step) == seen
        plan = schedule.plan(step, 2)
        assert plan[0][0] == seen and sum(count for _, count in plan) == schedule.size(step)
        due = 4 + (12 - 4) * min(1.0, seen * 7 / 1000)
        assert schedule.size(step) == due // 2 * 2
        seen += schedule.size(step)
    assert schedule.size(79) == 12


def test_published_ramp() -> None:
    """DeepSeek-V3: 3072 to 15360 sequences of 4096 over 469 B tokens."""
    ramp = RampConfig(start=3072, tokens=469_000_000_000)
    schedule = schedule_batches(section(global_batch=15360, micro_batch=1, ramp=ramp), sequence_length=4096)
    assert [level.batch for level in schedule.levels] == [3072, 6144, 9216, 12288, 15360]
    full = schedule.levels[-1].before * 4096
    assert 469e9 <= full < 469e9 + 12288 * 4096


def test_ramp_of_no_tokens_is_none() -> None:
    schedule = schedule_batches(section(ramp=RampConfig(start=2, tokens=0)), sequence_length=16)
    assert schedule.size(0) == 8 and schedule.before(1) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch": 9}, r"run\.micro_batch=2 must divide run\.global_batch=9"),
        ({"ramp": RampConfig(start=3)}, r"run\.ramp\.start=3 .*run\.micro_batch=2"),
        ({"ramp": RampConfig(start=6)}, r"run\.global_batch=8 .*run\.ramp\.start=6"),
        ({"ramp": RampConfig(start=2, jump=4)}, r"run\.global_batch=8 .*run\.ramp\.jump=4"),
        ({"steps": 0}, r"run\.steps=0"),
        ({"threads": 0}, r"run\.threads=0"),
    ],
)
def test_configuration_rules(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**changes)
