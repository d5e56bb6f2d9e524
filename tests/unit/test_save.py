"""Weights on disk and back, to the bit; what is missing, damaged or another model's is named."""

import json
from pathlib import Path

import pytest
import torch
from small_mesh import make_engine
from small_models import make_config, make_model

from model.build import allocate
from model.transformer import Transformer
from training.config import OptimizerConfig
from training.gather import name_tensors
from training.save import MANIFEST, load, open_saved, save


def fresh(model: Transformer, dtype: torch.dtype) -> Transformer:
    return allocate(model.config, dtype, "cpu")


def equal(a: Transformer, b: Transformer) -> bool:
    theirs = name_tensors([b])
    return all(torch.equal(tensor, theirs[name]) for name, tensor in name_tensors([a]).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_come_back_to_the_bit(dtype: torch.dtype, tied: bool, tmp_path: Path) -> None:
    model = make_model(make_config(mtp=1, tied=tied), dtype)
    # The engine makes the parameters slices of one buffer.
    make_engine(model, OptimizerConfig(lr=1.0))
    save(model, tmp_path / "weights")
    again = fresh(model, dtype)
    load(again, tmp_path / "weights")
    assert equal(model, again)
    assert any(router.bias.any() for router in again.routers())
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_shards_are_as_small_as_asked(tmp_path: Path) -> None:
    model = make_model(make_config(), torch.float32)
    save(model, tmp_path / "weights", shard=4000)
    files = sorted((tmp_path / "weights").glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in name_tensors([model]).values())
    assert len(files) > 3 and all(file.stat().st_size < max(4000, largest) + 4096 for file in files)
    again = fresh(model, torch.float32)
    load(again, tmp_path / "weights")
    assert equal(model, again)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Transformer, Path]:
    model = make_model(make_config(), torch.float32)
    save(model, tmp_path / "weights")
    return model, tmp_path / "weights"


def test_a_damaged_tensor_is_named(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    file = folder / "00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"00001\.safetensors: .* is damaged"):
        load(fresh(model, torch.float32), folder)
    with pytest.raises(ValueError, match=r"00001\.safetensors: .* is damaged"):
        open_saved(folder)


def test_a_truncated_shard_is_named(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    file = folder / "00001.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00001\.safetensors cannot be read"):
        load(fresh(model, torch.float32), folder)


def test_a_missing_shard_is_named(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    (folder / "00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00001\.safetensors"):
        load(fresh(model, torch.float32), folder)


def test_another_model_is_noticed(saved: tuple[Transformer, Path]) -> None:
    _, folder = saved
    with pytest.raises(ValueError, match=r"does not fit the model: layers\.3"):
        load(allocate(make_config(num_layers=4), torch.float32, "cpu"), folder)
    with pytest.raises(ValueError, match=r"embedding.* has shape \[19, 12\]; the model wants \[20, 12\]"):
        load(allocate(make_config(vocab_size=20), torch.float32, "cpu"), folder)
    with pytest.raises(ValueError, match="has dtype float32; the model wants bfloat16"):
        load(allocate(make_config(), torch.bfloat16, "cpu"), folder)


@pytest.mark.parametrize("text", [None, "", "{}", '{"format": 99, "tensors": {}}', "[1]"])
def test_a_manifest_that_is_none(saved: tuple[Transformer, Path], text: str | None) -> None:
    model, folder = saved
    (folder / MANIFEST).unlink()
    if text is not None:
        (folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not the manifest"):
        load(fresh(model, torch.float32), folder)


def test_files_are_those_of_the_folder(saved: tuple[Transformer, Path], tmp_path: Path) -> None:
    """A manifest cannot point out of its folder."""
    model, folder = saved
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "00001.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for entry in manifest["tensors"].values():
        entry["file"] = "../elsewhere.safetensors"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"weights/elsewhere\.safetensors"):
        load(fresh(model, torch.float32), folder)


def test_an_existing_folder_is_not_overwritten(saved: tuple[Transformer, Path]) -> None:
    model, folder = saved
    before = (folder / MANIFEST).stat().st_mtime_ns
    with pytest.raises(FileExistsError):
        save(model, folder)
    assert (folder / MANIFEST).stat().st_mtime_ns == before


def test_what_a_killed_save_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "weights.partial").mkdir()
    (tmp_path / "weights.partial" / "00001.safetensors").write_bytes(b"half")
    save(make_model(make_config(), torch.float32), tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
