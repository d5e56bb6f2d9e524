"""Learning rates at every boundary of every shape."""

import math
from itertools import pairwise

import pytest

from training.config import OptimizerConfig, RampConfig, RateConfig, RateShape, RunSection
from training.ramp import BatchSchedule, Level, schedule_batches
from training.rates import rate

FLAT = BatchSchedule((Level(0, 0, 4),))


def rates(steps: int, lr: float = 1.0, batches: BatchSchedule = FLAT, **shape: object) -> list[float]:
    config = OptimizerConfig(lr=lr, rate=RateConfig(**shape))
    return [rate(config, step, steps, batches) for step in range(steps)]


@pytest.mark.parametrize("shape", RateShape)
def test_warmup_is_linear_and_reaches_the_rate(shape: RateShape) -> None:
    stable = 0.5 if shape is RateShape.wsd else None
    found = rates(100, 2.0, shape=shape, warmup_steps=4, stable=stable)
    assert found[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


def test_no_warmup_starts_at_the_rate() -> None:
    assert rates(10, shape=RateShape.cosine)[0] == 1.0


def test_constant() -> None:
    assert rates(10, shape=RateShape.constant, warmup_steps=2) == [0.5] + [1.0] * 9


def test_cosine_falls_from_the_warmup_to_the_end() -> None:
    found = rates(108, shape=RateShape.cosine, warmup_steps=8, final=0.2)
    assert found[8] == 1.0
    assert found[58] == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert found[33] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert 0.2 < found[-1] < 0.201
    assert all(a > b for a, b in pairwise(found[8:]))


def test_wsd_is_flat_then_falls_as_one_minus_a_root() -> None:
    found = rates(100, shape=RateShape.wsd, warmup_steps=10, stable=0.8, final=0.1)
    assert found[10:81] == [1.0] * 71
    assert found[85] == pytest.approx(1 - 0.9 * math.sqrt(0.25))
    assert found[99] == pytest.approx(1 - 0.9 * math.sqrt(0.95))


def test_deepseek_phases_and_rates() -> None:
    """Steps of 1 B tokens: the boundaries are the published numbers of tokens."""
    found = rates(14_800, 2.2e-4, shape=RateShape.deepseek, warmup_steps=2000)
    assert found[2000:10_001] == [2.2e-4] * 8001
    assert found[10_001] < 2.2e-4
    assert found[12_150] == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert found[14_299] > 2.2e-5
    assert found[14_300:14_633] == pytest.approx([2.2e-5] * 333)
    assert found[14_633:] == pytest.approx([7.3e-6] * 167)


def test_a_batch_ramp_moves_steps_and_not_tokens() -> None:
    run = RunSection(name="test", steps=400, global_batch=8, micro_batch=1, ramp=RampConfig(start=2, tokens=300))
    batches = schedule_batches(run, sequence_length=1)
    found = rates(400, shape=RateShape.wsd, stable=0.5, batches=batches)
    last = max(step for step in range(400) if found[step] == 1.0)
    half = batches.before(400) / 2
    assert batches.before(last) <= half < batches.before(last + 1)
    assert last > 200


def test_a_run_of_warmup_only() -> None:
    assert rates(4, shape=RateShape.cosine, warmup_steps=8) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert rates(4, shape=RateShape.cosine, warmup_steps=4)[-1] == 1.0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"shape": RateShape.wsd}, r"optimizer\.rate\.stable=None"),
        ({"shape": RateShape.wsd, "stable": 1.0}, r"optimizer\.rate\.stable=1\.0"),
        ({"shape": RateShape.cosine, "stable": 0.5}, r"optimizer\.rate\.stable=0\.5 .*shape=cosine"),
        ({"warmup_steps": -1}, r"optimizer\.rate\.warmup_steps=-1"),
        ({"final": 1.5}, r"optimizer\.rate\.final=1\.5"),
    ],
)
def test_configuration_rules(shape: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RateConfig(**shape)
