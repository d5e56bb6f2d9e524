"""``shoestring export``: what a run saved, in a folder that loads as a published model."""

import json
from pathlib import Path

import pytest
import torch

from launcher import cli, folder
from launcher.compose import Composer
from launcher.invocation import Invocation
from model.build import allocate, build
from model.huggingface import load
from model.transformer import Transformer
from training.save import save


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Transformer]:
    """A run folder with weights that nobody trained."""
    overrides = (f"run.folder={tmp_path}", "run.id=tried", "model.num_layers=2", "model.mtp.depth=0")
    config, text = Composer().compose(overrides)
    path = folder.create(config, Invocation("train", (), overrides, text))
    model = build(config.model, torch.bfloat16, "cpu", seed=1)
    save(model, path / "weights")
    return path, model


def test_export_loads_to_the_bit(
    saved: tuple[Path, Transformer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, model = saved
    assert cli.main(["export", "tried", f"folder={tmp_path}", f"to={tmp_path / 'out'}", "shard_gigabytes=0.001"]) == 0
    assert f"{path} is in" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 256
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = allocate(model.config, torch.bfloat16, "cpu")
    load(found, tmp_path / "out")
    for (name, left), right in zip(model.state_dict().items(), found.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


def test_export_in_eight_bits(saved: tuple[Path, Transformer], tmp_path: Path) -> None:
    sizes = []
    for words in ((), ("fp8=true",)):
        folder = tmp_path / f"out{len(sizes)}"
        assert cli.main(["export", str(saved[0]), f"to={folder}", *words]) == 0
        sizes.append(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
        load(allocate(saved[1].config, torch.bfloat16, "cpu"), folder)
    assert sizes[1] < 0.7 * sizes[0]


def test_mistakes(saved: tuple[Path, Transformer], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, full = str(saved[0]), str(tmp_path)
    wrong = {
        ("export",): "export needs <run>",
        ("export", run): "to must have a value",
        ("export", run, f"to={full}"): f"to={full} must be a folder that does not exist yet",
        ("export", "treid", f"folder={full}", "to=x"): "did you mean tried?",
        ("export", run, f"to={full}/x", "shard_gigabytes=0"): "shard_gigabytes=0.0 must be positive",
    }
    for words, message in wrong.items():
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    (saved[0] / "weights" / "manifest.json").unlink()
    assert cli.main(["export", run, f"to={full}/x"]) == 2
    assert "manifest" in capsys.readouterr().err
