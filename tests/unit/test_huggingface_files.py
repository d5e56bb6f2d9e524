"""Folders in the published layout: equal to the bit either way, checked before anything changes, bounded memory."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import NAMED, is_softmax, make_glm
from published_models import EAGER
from safetensors.torch import save_file
from small_models import SOFTMAX, make_config, make_model
from torch import Tensor

from model.build import allocate
from model.config import ModelConfig, MTPConfig
from model.huggingface import Resident, export, load, publish
from model.huggingface_config import describe, read_config
from model.shards import INDEX, Pending, open_shards, write_shards
from model.transformer import Transformer

CONFIGS = NAMED | {
    "V3": make_config(mtp=1),
    "two MTP modules, tied": make_config(mtp=2, tied=True),
    "GLM-4.5 with its MTP module": make_glm(mtp=1),
}


def make(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    model = make_model(config, dtype, seed)
    if is_softmax(config):
        for router in model.routers():
            router.bias.zero_()
    return model


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name


def read_all(folder: Path) -> dict[str, Tensor]:
    shards = open_shards(folder)
    return {name: shards.read(name) for name in shards.entries}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_ours_out_and_in(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model, other = make(config, dtype), make_model(config, dtype, seed=1)
    export(Resident(model), config, tmp_path / "new", shard=2000)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 3
    load(other, tmp_path / "new")
    assert_same(Resident(model).tensors, Resident(other).tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_in_and_out_of_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """What it reads from our folder is our model; what we read from its folder is our model again."""
    config = replace(CONFIGS[name], mtp=MTPConfig())  # it leaves MTP out
    model, other = make(config, dtype), make(config, dtype, seed=1)
    export(Resident(model), config, tmp_path / "ours", shard=2000)
    counterpart = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto", **EAGER)
    assert counterpart.dtype == dtype
    counterpart.save_pretrained(tmp_path / "theirs")

    found = read_config(tmp_path / "theirs")
    assert describe(found, "any") == describe(config, "any")
    load(other, tmp_path / "theirs")
    # Until 5.23 it rounds routers to the dtype of the rest, since 5.24 it keeps them in float32.
    rounded = all(p.dtype == dtype for name, p in counterpart.named_parameters() if name.endswith("gate.weight"))
    for key, tensor in Resident(model).tensors.items():
        wanted = tensor.to(dtype).to(tensor.dtype) if rounded and key.endswith("router.weight") else tensor
        assert torch.equal(Resident(other).tensors[key], wanted), key

    export(Resident(other), found, tmp_path / "again")
    theirs, again = read_all(tmp_path / "theirs"), read_all(tmp_path / "again")
    assert {key for key, tensor in theirs.items() if tensor.numel()} == again.keys()
    for key, tensor in again.items():
        assert torch.equal(tensor, theirs[key].to(tensor.dtype)), key


def test_a_model_without_mtp_takes_the_rest_of_one_with_it(tmp_path: Path) -> None:
    config, shorter = make_config(mtp=2), make_config()
    model, other = make(config), make(shorter, seed=1)
    export(Resident(model), config, tmp_path)
    load(other, tmp_path)
    tensors = Resident(model).tensors
    assert_same(Resident(other).tensors, {name: t for name, t in tensors.items() if not name.startswith("mtp.")})


def test_rotary_halves_stay_where_they_are(tmp_path: Path) -> None:
    """rope_interleave=false: the file's pairs are halves already."""
    config = make_config()
    model, other, third = make(config), make(config, seed=1), make(config, seed=2)
    export(Resident(model), config, tmp_path)
    edit(tmp_path / "config.json", rope_interleave=False)
    load(other, tmp_path)
    counterpart = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)
    ids = torch.arange(7)[None]
    torch.testing.assert_close(other.logits(ids), counterpart(ids).logits, rtol=1e-5, atol=1e-5)
    edit(tmp_path / "config.json", rope_interleave=True)
    load(third, tmp_path)
    assert not torch.allclose(other.logits(ids), third.logits(ids), rtol=1e-3)


def test_weights_are_rounded_to_the_model(tmp_path: Path) -> None:
    config = make_config()
    model, other = make(config, torch.float32), make(config, torch.bfloat16, seed=1)
    export(Resident(model), config, tmp_path)
    load(other, tmp_path)
    for name, tensor in Resident(other).tensors.items():
        assert torch.equal(tensor, Resident(model).tensors[name].to(tensor.dtype)), name


def test_published_names() -> None:
    """Spelt out once, as the published index has them."""
    model = make(make_config(mtp=1))
    names = publish(Resident(model), model.config).keys()
    attention = {"q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"}
    block = {f"self_attn.{part}.weight" for part in attention}
    block |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    mlp = {f"{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
    moe = {f"mlp.experts.{e}.{part}" for e in range(6) for part in mlp} | {f"mlp.shared_experts.{part}" for part in mlp}
    moe |= {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
    mtp = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight"}
    mtp |= {"shared_head.norm.weight", "shared_head.head.weight"}
    layers = [block | {f"mlp.{part}" for part in mlp}, block | moe, block | moe, block | moe | mtp]
    expected = {f"model.layers.{i}.{name}" for i, layer in enumerate(layers) for name in layer}
    assert names == expected | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The folder with its tensors changed."""
    tensors = {name: tensor.clone() for name, tensor in read_all(folder).items()}
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    write_shards(folder, {name: Pending(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}, 2000)


def save_one(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """The folder with its tensors changed and in the only file of a small model."""
    rewrite(folder, change)
    tensors = read_all(folder)
    for path in folder.glob("model*"):
        path.unlink()
    tensors[GATE] = tensors[GATE].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors")


def edit_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


GATE, BIAS = "model.layers.1.mlp.experts.4.gate_proj.weight", "model.layers.2.mlp.gate.e_score_correction_bias"
COPY = "model.layers.3.embed_tokens.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: rewrite(f, lambda t: t.pop(BIAS)), f"folder: {BIAS} is missing"),
    "left over": (
        lambda f: rewrite(f, lambda t: t.update({"lm_head.bias": torch.ones(3)})),
        ".safetensors: lm_head.bias has no place in the model",
    ),
    "layer left over": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.4.enorm.weight": torch.ones(12)})),
        ".safetensors: model.layers.4.enorm.weight has no place in the model",
    ),
    "shape": (
        lambda f: rewrite(f, lambda t: t.update({GATE: t[GATE].t().contiguous()})),
        f".safetensors: {GATE} has shape [12, 5]; the model wants [5, 12]",
    ),
    "copy": (
        lambda f: rewrite(f, lambda t: t[COPY].neg_()),
        f".safetensors: {COPY} differs from model.embed_tokens.weight",
    ),
    "copy of another shape": (
        lambda f: rewrite(f, lambda t: t.update({COPY: t[COPY][1:].contiguous()})),
        f".safetensors: {COPY} differs from model.embed_tokens.weight",
    ),
    "dtype": (
        lambda f: save_one(f, len),
        f"model.safetensors: {GATE} is F8_E4M3, and its scales {GATE}_scale_inv are missing",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), f"folder has neither {INDEX} nor model.safetensors"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not an index"),
    "index of another kind": (lambda f: (f / INDEX).write_text("[]"), f"{INDEX} is not an index"),
    "index that leads elsewhere": (
        lambda f: edit_index(f, lambda files: files.update({GATE: "../" + files[GATE]})),
        f"{INDEX}: ../model-0",
    ),
    "index with the wrong file": (
        lambda f: edit_index(f, lambda files: files.update({GATE: files["model.norm.weight"]})),
        f"{GATE} is ",
    ),
    "tensor not in the index": (
        lambda f: edit_index(f, lambda files: files.pop(GATE)),
        f".safetensors: {GATE} is in the file but not in the index",
    ),
    "no file": (lambda f: first(f).unlink(), ".safetensors cannot be read: "),
    "short file": (lambda f: os.truncate(first(f), 1500), ".safetensors cannot be read: "),
    "no file any more": (lambda f: first(f).write_bytes(b"<html>"), ".safetensors cannot be read: "),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(mtp=1)
    folder = tmp_path_factory.mktemp("published") / "folder"
    export(Resident(make(config)), config, folder, shard=2000)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_anything_changes(damage: str, published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(published, folder)
    change, message = DAMAGE[damage]
    change(folder)
    model = make(make_config(mtp=1), seed=1)
    before = {name: tensor.clone() for name, tensor in Resident(model).tensors.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load(model, folder)
    assert_same(Resident(model).tensors, before)


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    model = make(make_config())
    (tmp_path / "old").write_text("mine")
    for folder in (tmp_path, tmp_path / "old"):
        with pytest.raises(ValueError, match=f"to={folder} must be a folder that does not exist yet, or is empty"):
            export(Resident(model), model.config, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_export_of_other_weights_writes_nothing(tmp_path: Path) -> None:
    model = make(make_config())
    with pytest.raises(
        ValueError, match=r"layers\.0\.mlp\.swiglu\.gate_up\.weight: .* \(2, 11, 12\), .* \(2, 10, 12\)"
    ):
        export(Resident(model), make_config(ffn=11), tmp_path / "new")
    model = make_model(make_config(moe=SOFTMAX), torch.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.router\.bias cannot be published"):
        export(Resident(model), model.config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_export_is_complete_only_with_its_index(tmp_path: Path) -> None:
    """Stopped half-way, it cannot be taken for a whole one."""
    model = make(make_config())

    class Broken(Resident):
        def read(self, name: str, index: Any = ()) -> Tensor:
            if name == "norm.weight":
                raise OSError("the disk is gone")
            return super().read(name, index)

    with pytest.raises(OSError, match="the disk is gone"):
        export(Broken(model), model.config, tmp_path / "new", shard=2000)
    assert list((tmp_path / "new").glob("*.safetensors"))
    with pytest.raises(ValueError, match="has neither"):
        load(model, tmp_path / "new")


def test_a_slice_is_read_alone(published: Path) -> None:
    shards, whole = open_shards(published), read_all(published)
    for index in [(slice(1, 3),), (2,), (slice(None), slice(4, 7)), (slice(1, 3), slice(0, 12, 1)), (0, slice(2, 5))]:
        assert torch.equal(shards.read(GATE, index), whole[GATE][index])


def peak(what: Callable[[], object]) -> int:
    """Bytes by which the process grows at most while ``what`` runs."""
    status = Path("/proc/self/status")

    def measure(key: str) -> int:
        return 1024 * int(status.read_text().split(f"{key}:")[1].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at what is in memory now
    before = measure("VmRSS")
    what()
    return measure("VmHWM") - before


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak memory anew"
)
def test_memory_is_bounded(tmp_path: Path) -> None:
    """A model of 103 MB, the largest tensor of which has 34 MB here and 1 MB published."""
    moe = {"experts": 16, "ffn": 512, "groups": 1, "top_groups": 1, "shared_experts": 0}
    config = make_config(hidden=512, ffn=512, vocab_size=512, moe=moe)
    model = allocate(config, torch.float32, "cpu")
    for tensor in Resident(model).tensors.values():
        tensor.data.fill_(0.5)
    assert sum(tensor.nbytes for tensor in Resident(model).tensors.values()) > 100 * 10**6
    assert peak(lambda: torch.zeros(10**7).add_(1)) > 39 * 10**6  # it measures
    export(Resident(model), config, tmp_path / "first")  # what libraries load and keep at first use does not count
    load(model, tmp_path / "first")
    assert peak(lambda: export(Resident(model), config, tmp_path / "new", shard=2 * 10**7)) < 8 * 10**6
    assert peak(lambda: load(model, tmp_path / "new")) < 8 * 10**6
