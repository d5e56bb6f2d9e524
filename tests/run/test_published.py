"""From a run to a published folder and back: ``export``, `transformers`, ``init_from``."""

from pathlib import Path

import pytest
import torch
import transformers
from test_train import SMALL

from launcher import folder
from launcher.cli import main
from training.config import Device
from training.restore import restore
from training.save import open_saved

QUICK = ("data.corpus=[text.txt]", *SMALL, "precision=fp32", "run.sample.tokens=0")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run called ``first`` has been, and its weights are in ``published``."""
    place = tmp_path_factory.mktemp("published")
    (place / "text.txt").write_text("".join(f"line {i}: {i * i} and {i % 7} more\n" for i in range(900)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["train", *QUICK, "run.id=first"]) == 0
        assert main(["export", "first", "to=published", "shard_gigabytes=1e-4"]) == 0
    return place


def test_transformers_computes_the_same(place: Path) -> None:
    run = folder.open("first", str(place / "runs"))
    model, _ = restore(folder.load_config(run.path), run.weights, Device.cpu, 1)
    ids = torch.arange(40)[None] % 256
    published = transformers.AutoModelForCausalLM.from_pretrained(place / "published", experts_implementation="eager")
    torch.testing.assert_close(published(ids).logits, model.logits(ids), rtol=1e-4, atol=1e-4)


def test_a_run_starts_from_published_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that learns nothing ends with the weights it started from."""
    monkeypatch.chdir(place)
    words = ("init_from=published", "run.id=second", "run.seed=7", "run.steps=1", "optimizer.lr=1e-30")
    assert main(["train", *QUICK, *words, "model.moe.bias_speed=0"]) == 0
    first, second = (open_saved(place / "runs" / name / "weights") for name in ("first", "second"))
    for name in first.entries:
        assert torch.equal(first.read(name), second.read(name)), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("init_from=runs",), "config.json is not a model's configuration: "),
        (
            ("init_from=published", "model.hidden=48"),
            "model.hidden=48 must be 32, hidden_size of published/config.json",
        ),
        (
            ("init_from=published", "model.mtp.depth=2"),
            "model.mtp.depth=2 must be at most 1, num_nextn_predict_layers of",
        ),
    ],
)
def test_mistakes_are_named(
    words: tuple[str, ...],
    message: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    capsys.readouterr()
    assert main(["train", *QUICK, *words]) == 2
    assert message in capsys.readouterr().err
