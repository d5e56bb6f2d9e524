"""A run's first checkpoint, made of published weights: what is in it, what it takes, and that a run goes back to it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from family_models import NAMED
from small_models import make_config, make_model
from small_runs import make_run, write_text
from test_huggingface_files import peak
from test_resume import flip, make, rows

from model.build import allocate, build
from model.config import ScoreFunction
from model.huggingface import Resident, export, load
from model.transformer import Transformer
from training.checkpoint import first, folders
from training.checkpoint.direct import SIZE
from training.checkpoint.first import admit
from training.checkpoint.weights import open_weights
from training.config import Precision
from training.loop import train


def check(model: Transformer, place: Path) -> None:
    """The checkpoint in ``place`` has the weights of ``model``, and no moments."""
    manifest = folders.read_manifest(place)
    found = open_weights(place, manifest, model.config)
    tensors = Resident(model).tensors
    assert found.shapes() == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert not [name for name in manifest.tensors if name.startswith(("m/", "v/"))]
    for name, tensor in tensors.items():
        assert torch.equal(found.read(name), tensor), name


@pytest.mark.parametrize("precision", [Precision.bf16, Precision.fp32, Precision.fp64])
@pytest.mark.parametrize("fp8", [False, True])
def test_it_has_what_a_model_would_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision, fp8: bool
) -> None:
    """In files of a few tensors, of weights in other dtypes than the run's, and without one of two MTP modules."""
    monkeypatch.setattr(first, "FILE", 20_000)
    config = make_run(tmp_path, model=make_config(vocab_size=264, mtp=1), precision=precision)
    published = build(make_config(vocab_size=264, mtp=2), torch.float32, "cpu", seed=3)
    for router in published.routers():
        router.bias.normal_()
    export(Resident(published), published.config, tmp_path / "published", fp8=fp8)
    size = admit(config, tmp_path / "published", tmp_path / "00000000")
    dtype = {Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}.get(precision, torch.float32)
    wanted = allocate(config.model, dtype, "cpu")
    load(wanted, tmp_path / "published")
    check(wanted, tmp_path / "00000000")
    assert len(list((tmp_path / "00000000").glob("*.safetensors"))) > 2
    masters = 8 if precision is Precision.fp64 else 4
    assert size == masters * sum(tensor.numel() for tensor in Resident(wanted).tensors.values())


@pytest.mark.parametrize("name", ["glm4_moe: large", "qwen3_moe: dense layers between", "llama: one head"])
def test_other_families(name: str, tmp_path: Path) -> None:
    config = make_run(tmp_path, model=replace(NAMED[name], vocab_size=264))
    published = make_model(config.model, torch.float32)
    for router in published.routers():
        router.bias.zero_()
    export(Resident(published), published.config, tmp_path / "published")
    admit(config, tmp_path / "published", tmp_path / "00000000")
    wanted = allocate(config.model, torch.float32, "cpu")
    load(wanted, tmp_path / "published")
    check(wanted, tmp_path / "00000000")
    check(published, tmp_path / "00000000")


def test_biases_that_a_layout_has_not_are_zero(tmp_path: Path) -> None:
    """DeepSeek-V2's: scores are softmax, and nothing is added to them."""
    moe = {"score": ScoreFunction.softmax, "bias_speed": 0.0, "normalize_gates": False}
    config = make_run(tmp_path, model=make_config(vocab_size=264, moe=moe))
    model = build(config.model, torch.float32, "cpu", seed=3)
    export(Resident(model), config.model, tmp_path / "published")
    admit(config, tmp_path / "published", tmp_path / "00000000")
    assert any(name.endswith("router.bias") for name in Resident(model).tensors)
    check(model, tmp_path / "00000000")


def test_a_run_that_lost_its_checkpoints_begins_with_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the damaged one most is read before that is seen, moments too: they are zero again."""
    write_text(tmp_path)
    config = make(tmp_path, steps=4, every=2)
    model = build(config.model, torch.float32, "cpu", seed=3)
    export(Resident(model), config.model, tmp_path / "published")
    whole, again = tmp_path / "whole", tmp_path / "again"
    admit(config, tmp_path / "published", whole / "checkpoints" / "00000000")
    train(config, whole)
    assert folders.find(whole / "checkpoints") == [0, 2, 4]
    shutil.copytree(whole, again)
    for step in (2, 4):
        flip(again / "checkpoints" / f"{step:08}" / "00000.safetensors")
    train(config, again)
    assert "goes on after step 0 and 0 tokens" in capsys.readouterr().out.partition("00000002.damaged")[2]
    assert rows(again) == rows(whole)
    # Another seed begins with the same weights.
    other = make(tmp_path, steps=4, every=2, seed=5)
    admit(config, tmp_path / "published", tmp_path / "other" / "checkpoints" / "00000000")
    train(replace(other), tmp_path / "other")
    assert [row.get("loss") for row in rows(tmp_path / "other")] == [row.get("loss") for row in rows(whole)]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak memory")
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 103 MB, the largest tensor of which has 34 MB here and 1 MB published: out, in, and out again."""
    moe = {"experts": 16, "ffn": 512, "groups": 1, "top_groups": 1, "shared_experts": 0}
    config = make_run(tmp_path, model=make_config(hidden=512, ffn=512, vocab_size=512, moe=moe))
    model = allocate(config.model, torch.float32, "cpu")
    for tensor in Resident(model).tensors.values():
        tensor.data.fill_(0.5)
    export(Resident(model), config.model, tmp_path / "published")
    admit(config, tmp_path / "published", tmp_path / "00000000")  # what libraries keep at first use does not count
    assert peak(lambda: admit(config, tmp_path / "published", tmp_path / "00000001")) < 8 * 10**6 + SIZE

    def publish() -> None:
        source = open_weights(tmp_path / "00000001", folders.read_manifest(tmp_path / "00000001"), config.model)
        export(source, config.model, tmp_path / "again")

    assert peak(publish) < 45 * 10**6  # two blocks of 16 MiB, and what an export takes
