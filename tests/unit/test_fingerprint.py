"""State that changes by itself is found before it is used or kept; a step that a machine got wrong is taken again."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_run, open_run

from training import steps
from training.checkpoint.manifest import DamagedError
from training.checkpoint.staging import Staging
from training.checkpoint.state import collect
from training.health.fingerprint import CorruptionError, Fingerprints, find_weights
from training.loop import train
from training.metrics import read
from training.setup import Setup
from training.step import run_step


@pytest.fixture
def setup(text: Path) -> Setup:
    found = open_run(make_run(text))
    assert run_step(found, 0, lambda: False) is not None
    return found


def find(setup: Setup, name: str) -> torch.Tensor:
    """A tensor of the state by the beginning of its name."""
    tensors = {chunk.name: chunk.tensor for chunk in collect(setup)} | find_weights(setup)
    return next(tensor.detach() for key, tensor in tensors.items() if key.startswith(name))


@pytest.mark.parametrize("name", ["m/layers.1.experts", "v/head", "buffer/", "weight/layers.0", "master/embedding"])
def test_a_bit_that_flips_is_found_before_the_next_update(setup: Setup, name: str) -> None:
    fingerprints = Fingerprints(setup, 1)
    fingerprints.take(1)
    assert run_step(setup, 1, lambda: False, fingerprints.verify) is not None, "nothing has changed"
    fingerprints.take(2)
    find(setup, name).view(-1).view(torch.uint8)[5] ^= 16
    with pytest.raises(CorruptionError, match="changed in memory after step 2, though nothing wrote there") as caught:
        run_step(setup, 2, lambda: False, fingerprints.verify)
    assert str(caught.value).startswith("rank 0: ") and name.partition("/")[2] in str(caught.value)


def test_between_two_sums_nothing_is_compared(setup: Setup) -> None:
    fingerprints = Fingerprints(setup, 2)
    fingerprints.take(1)
    find(setup, "m/").view(-1)[0] += 1
    fingerprints.verify()
    fingerprints.take(2)
    find(setup, "m/").view(-1)[0] += 1
    with pytest.raises(CorruptionError):
        fingerprints.verify()


def test_a_copy_that_is_not_what_was_there_is_not_kept(setup: Setup) -> None:
    """Also when the next step is over before the copy is looked at."""
    fingerprints = Fingerprints(setup, 1)
    fingerprints.take(1)
    check, copies = fingerprints.expect(1), Staging(torch.device("cpu")).take(collect(setup))
    assert run_step(setup, 1, lambda: False, fingerprints.verify) is not None
    fingerprints.take(2)
    check(copies)
    copies[3].tensor.view(-1).view(torch.uint8)[1] ^= 1
    with pytest.raises(DamagedError, match="is not in memory as it was after step 1") as caught:
        check(copies)
    assert str(caught.value).startswith(copies[3].name)


def spoil(how: Callable[[int, int], bool]) -> tuple[Callable[..., Any], list[tuple[int, float]]]:
    """A step whose first gradient is no number where ``how(step, attempt)`` says so; and the norms of all attempts."""
    tried: list[tuple[int, float]] = []

    def take(setup: Setup, step: int, *others: Any) -> Any:
        attempt = sum(before == step for before, _ in tried)
        accumulate = setup.engine.accumulate
        if how(step, attempt):

            def wrong(parameter: Any, grad: torch.Tensor) -> None:
                grad.view(-1)[0] = math.nan
                accumulate(parameter, grad)

            setup.engine.accumulate = wrong  # type: ignore[method-assign]
        row = run_step(setup, step, *others)
        setup.engine.accumulate = accumulate  # type: ignore[method-assign]
        assert row is not None
        tried.append((step, row.grad_norm))
        return row

    return take, tried


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(row["loss"], row["grad_norm"], row["skipped"]) for row in read(folder / "metrics.jsonl", "step")]


def test_a_step_that_was_wrong_once_loses_nothing(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("quiet", "once", "always"):
        (tmp_path / name).mkdir()
    config = make_run(text)
    train(config, tmp_path / "quiet")
    take, tried = spoil(lambda step, attempt: step == 2 and attempt == 0)
    monkeypatch.setattr(steps, "run_step", take)
    train(config, tmp_path / "once")
    assert [step for step, _ in tried] == [0, 1, 2, 2, 3, 4, 5] and math.isnan(tried[2][1])
    assert losses(tmp_path / "once") == losses(tmp_path / "quiet")
    assert [row["step"] for row in read(tmp_path / "once" / "metrics.jsonl", "retry")] == [2]
    assert "step 3: loss or gradient were not finite, and are now that it was taken again" in capsys.readouterr().out
    take, tried = spoil(lambda step, attempt: step == 2)
    monkeypatch.setattr(steps, "run_step", take)
    train(config, tmp_path / "always")
    assert [step for step, _ in tried] == [0, 1, 2, 2, 3, 4, 5]
    assert [skipped for *_, skipped in losses(tmp_path / "always")] == [False, False, True, False, False, False]
    assert not read(tmp_path / "always" / "metrics.jsonl", "retry")
