"""The moving average of the weights is that of the formula, survives a restart to the bit, and can be exported."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import make_run
from torch import Tensor

from model.build import build
from training.checkpoint import folders
from training.checkpoint.plan import load
from training.checkpoint.weights import open_weights
from training.chunk import Chunk
from training.config import OptimizerConfig, Precision
from training.loop import train

DECAY = 0.75


def make(text: Path, **changes: Any) -> Any:
    config = make_run(text, steps=4, precision=Precision.fp64, optimizer={"ema": DECAY}, **changes)
    config.run.sample.tokens = 0
    config.checkpoint.every, config.checkpoint.keep, config.checkpoint.minutes = 1, 9, None
    return config


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    train(make(text), folder)
    return folder


def read(folder: Path, step: int, kind: str) -> dict[str, Tensor]:
    """All tensors of a kind in a checkpoint, by the rest of their names."""
    place = folders.locate(folder / "checkpoints", step)
    manifest = folders.read_manifest(place)
    shapes = {name: stored.shape for name, stored in manifest.tensors.items() if name.startswith(kind)}
    chunks = [
        Chunk(name, shape, (0,) * len(shape), torch.zeros(shape, dtype=torch.float64)) for name, shape in shapes.items()
    ]
    load(place, manifest, chunks)
    return {chunk.name.removeprefix(kind): chunk.tensor for chunk in chunks}


def test_the_average_is_that_of_the_formula(text: Path, whole: Path) -> None:
    config = make(text)
    average = dict(build(config.model, torch.float64, "cpu", config.run.seed).named_parameters())
    for step in range(1, 5):
        weights, found = read(whole, step, "master/"), read(whole, step, "ema/")
        assert found.keys() == weights.keys() == average.keys()
        for name, tensor in weights.items():
            average[name] = DECAY * average[name].detach() + (1 - DECAY) * tensor
            torch.testing.assert_close(found[name], average[name], rtol=1e-12, atol=1e-14)
            assert not torch.equal(found[name], tensor) or not tensor.any(), name


def go_on(text: Path, whole: Path, folder: Path, **changes: Any) -> None:
    shutil.copytree(whole / "checkpoints" / "00000002", folder / "checkpoints" / "00000002")
    shutil.copy(whole / "metrics.jsonl", folder)
    config = make(text)
    for name, value in changes.items():
        setattr(config.optimizer, name, value)
    train(config, folder)


def test_it_goes_on_with_the_same_bits(text: Path, whole: Path, tmp_path: Path) -> None:
    go_on(text, whole, tmp_path)
    found, wanted = read(tmp_path, 4, "ema/"), read(whole, 4, "ema/")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_run_may_begin_and_end_to_have_one(text: Path, whole: Path, tmp_path: Path) -> None:
    """Without, nothing else changes; where it begins, it is the weights that there are then."""
    without, again = tmp_path / "without", tmp_path / "again"
    go_on(text, whole, without, ema=None)
    assert read(without, 4, "ema/") == {}
    found, wanted = read(without, 4, "master/"), read(whole, 4, "master/")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    shutil.copytree(without / "checkpoints" / "00000003", again / "checkpoints" / "00000003")
    train(make(text), again)
    before, after, average = read(again, 3, "master/"), read(again, 4, "master/"), read(again, 4, "ema/")
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, DECAY * before[name] + (1 - DECAY) * after[name], rtol=1e-12, atol=1e-14)


def test_it_can_be_read_as_weights(text: Path, whole: Path, tmp_path: Path) -> None:
    place, model = folders.locate(whole / "checkpoints", 4), make(text).model
    manifest = folders.read_manifest(place)
    average, weights = open_weights(place, manifest, model, average=True), open_weights(place, manifest, model)
    expected = read(whole, 4, "ema/")
    assert average.shapes() == weights.shapes()
    assert all(torch.equal(average.read(name), tensor) for name, tensor in expected.items())
    go_on(text, whole, tmp_path, ema=None)
    place = folders.locate(tmp_path / "checkpoints", 4)
    with pytest.raises(ValueError, match=r"ema=true: .*00000004 has no average of the weights"):
        open_weights(place, folders.read_manifest(place), model, average=True)


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.ema={decay} must be at least 0 and below 1, or null"):
        OptimizerConfig(lr=1.0, ema=decay)
