"""Published weights in 8 bits: read as value times scale, written as quantised, the same bits out and in and out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import make_config, make_model
from torch import Tensor

from model.build import allocate
from model.config import ModelConfig
from model.fp8 import DEEPSEEK_V3, quantise
from model.huggingface import Resident, export, load
from model.huggingface_fp8 import SUFFIX
from model.shards import INDEX
from model.transformer import Transformer

CONFIG = make_config(
    mtp=1, hidden=150, ffn=260, attention={"heads": 3, "q_rank": 70, "kv_rank": 140, "nope_dim": 40, "v_dim": 50},
    moe={"ffn": 130},
)  # fmt: skip
EIGHT = torch.float8_e4m3fn
DOWN = "model.layers.0.mlp.down_proj.weight"
STAYS = ("embed_tokens", "norm", "lm_head", "mlp.gate.", "eh_proj", "shared_head")


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write(model: Transformer, folder: Path) -> dict[str, Tensor]:
    """Exports in 8 bits; gives what is in the files."""
    export(Resident(model), CONFIG, folder, shard=10**6, fp8=True)
    return read(folder)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        for name, tensor in first.items()
    )


def blow_up(values: Tensor, scales: Tensor) -> Tensor:
    """Every block times its scale, one after the other."""
    out = values.float()
    for i, row in enumerate(scales):
        for j, scale in enumerate(row):
            out[128 * i : 128 * i + 128, 128 * j : 128 * j + 128] *= scale
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """Projections and nothing else, quantised as they would lie in a folder of the model's own dtype."""
    model = make_model(CONFIG, dtype)
    export(Resident(model), CONFIG, tmp_path / "plain")
    plain, eight = read(tmp_path / "plain"), write(model, tmp_path / "eight")
    for name, tensor in plain.items():
        if any(part in name for part in STAYS):
            assert torch.equal(eight[name], tensor) and name + SUFFIX not in eight, name
            continue
        values, scales, _ = quantise(tensor, DEEPSEEK_V3.weights)
        assert eight[name].dtype is EIGHT and torch.equal(eight[name].float(), values.float()), name
        assert torch.equal(eight[name + SUFFIX], scales), name
    assert len(eight) > 1.5 * len(plain)
    config = json.loads((tmp_path / "eight" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    sizes = {len(list((tmp_path / name).glob("*.safetensors"))) for name in ("plain", "eight")}
    assert min(sizes) >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_reading_is_value_times_scale(tmp_path: Path, dtype: torch.dtype) -> None:
    """As DeepSeek's own conversion to BF16 has it: the same model as from the plain folder of these products."""
    eight = write(make_model(CONFIG, torch.float32), tmp_path / "eight")
    wide = {
        name: blow_up(tensor, eight[name + SUFFIX]) if tensor.dtype is EIGHT else tensor
        for name, tensor in eight.items()
        if not name.endswith(SUFFIX)
    }
    (tmp_path / "wide").mkdir()
    save_file(wide, tmp_path / "wide" / "model.safetensors")
    config = json.loads((tmp_path / "eight" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "wide" / "config.json").write_text(json.dumps(config))
    found, expected = allocate(CONFIG, dtype, "cpu"), allocate(CONFIG, dtype, "cpu")
    load(found, tmp_path / "eight")
    load(expected, tmp_path / "wide")
    for (name, ours), theirs in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_out_and_in_and_out_again_is_the_same_to_the_bit(tmp_path: Path, dtype: torch.dtype, seed: int) -> None:
    first = write(make_model(CONFIG, torch.float32, seed), tmp_path / "first")
    again = allocate(CONFIG, dtype, "cpu")
    load(again, tmp_path / "first")
    second = write(again.float(), tmp_path / "second")
    assert same(first, second)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """One file, with something else in it."""
    tensors = read(folder)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no scales": (lambda t: t.pop(DOWN + SUFFIX), rf"{DOWN} is F8_E4M3, and its scales {DOWN}{SUFFIX} are missing"),
    "scales of other blocks": (
        lambda t: t.update({DOWN + SUFFIX: torch.ones(2, 2)}),
        rf"{DOWN}{SUFFIX} is F32 \[2, 2\]; blocks of {DOWN} have F32 \[2, 3\]",
    ),
    "narrow scales": (lambda t: t.update({DOWN + SUFFIX: t[DOWN + SUFFIX].bfloat16()}), r"is BF16 \[2, 3\]; blocks of"),
    "scales of nothing": (
        lambda t: t.update({DOWN: t[DOWN].float()}),
        rf"{DOWN}{SUFFIX} has no place in the model",
    ),
}


@pytest.mark.parametrize(("edit", "says"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_anything_changes(
    tmp_path: Path, edit: Callable[[dict[str, Tensor]], object], says: str
) -> None:
    write(make_model(CONFIG, torch.float32), tmp_path / "eight")
    change(tmp_path / "eight", edit)
    model = make_model(CONFIG, torch.float32, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        load(model, tmp_path / "eight")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_powers_of_two_are_read_as_well(tmp_path: Path) -> None:
    """As DeepSeek-V3.1 was published."""
    write(make_model(CONFIG, torch.float32), tmp_path / "eight")
    change(tmp_path / "eight", lambda t: t.update({n: s.log2().ceil().exp2() for n, s in t.items() if SUFFIX in n}))
    path = tmp_path / "eight" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["scale_fmt"] = "ue8m0"
    path.write_text(json.dumps(config))
    found: ModelConfig = CONFIG
    load(allocate(found, torch.bfloat16, "cpu"), tmp_path / "eight")
