"""A dense model made one with experts: the same logits, in the family that has them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import make_dense
from published_models import EAGER
from small_models import make_config, make_model

from model.build import allocate
from model.config import ModelConfig
from model.huggingface import Resident, export, load
from model.huggingface_config import read_config
from model.upcycle import upcycle
from model.upcycle_config import UpcycleConfig

DENSE = {
    "qwen3": (make_dense({"qk_norm": True}, tied=True), "qwen3_moe"),
    "qwen2": (make_dense({"bias": True}), "glm4_moe"),
    "llama": (make_dense(), "glm4_moe"),
    "deepseek_v3": (make_config(moe={"experts": 0}, hidden=24, ffn=36), "deepseek_v3"),
}
WANTED = {
    "copies": UpcycleConfig(experts=6, top_k=2),
    "parts": UpcycleConfig(experts=12, top_k=6, split=3, dense_layers=1, seed=3),
    "parts of one copy": UpcycleConfig(experts=4, top_k=4, split=4),
}
IDS = torch.arange(22).view(2, 11) % 19


def publish(config: ModelConfig, folder: Path) -> torch.Tensor:
    """The logits of a model that is now in ``folder``, in float64."""
    model = make_model(config)
    export(Resident(model), config, folder)
    with torch.no_grad():
        return model.logits(IDS)


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("family", DENSE)
def test_computes_the_same(family: str, wanted: str, tmp_path: Path) -> None:
    dense, becomes = DENSE[family]
    expected = publish(dense, tmp_path / "dense")
    made = upcycle(tmp_path / "dense", tmp_path / "experts", WANTED[wanted], shard=5000)
    assert read_config(tmp_path / "experts").name == becomes
    assert made.routed_blocks() == list(range(WANTED[wanted].dense_layers, 3))

    model = allocate(made, torch.float64, "cpu")
    load(model, tmp_path / "experts")
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), expected, rtol=1e-9, atol=1e-9)
    loads = make_loads(model, made)
    assert int((loads > 0).sum(1).min()) >= min(4, made.moe.experts)  # copies are chosen in turn
    if made.moe.top_k < made.moe.experts:
        parts = loads.unflatten(1, (-1, WANTED[wanted].split))
        assert (parts == parts[..., :1]).all() and parts.float().std() > 0  # whole ones

    counterpart = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "experts", dtype=torch.float32, **EAGER)
    with torch.no_grad():
        torch.testing.assert_close(counterpart(IDS).logits.double(), expected, rtol=1e-3, atol=1e-3)


def make_loads(model: Any, config: ModelConfig) -> torch.Tensor:
    """Tokens per expert, [layers, experts]."""
    seen: list[torch.Tensor] = []
    for router in model.routers():
        router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.load))
    with torch.no_grad():
        model.logits(IDS)
    return torch.stack(seen)


def test_seeds_draw_routers_and_nothing_else(tmp_path: Path) -> None:
    dense, _ = DENSE["qwen3"]
    publish(dense, tmp_path / "dense")
    models = []
    for seed in (0, 1):
        made = upcycle(tmp_path / "dense", tmp_path / str(seed), UpcycleConfig(seed=seed))
        models.append(allocate(made, torch.float32, "cpu"))
        load(models[-1], tmp_path / str(seed))
    for (name, first), second in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second) == (not name.endswith("router.weight")), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"experts": 0}, "experts=0 must be positive"),
    "no part": ({"split": 0}, "split=0 must be positive"),
    "left over": ({"split": 3}, "split=3 must divide experts=8"),
    "half a copy": ({"split": 4}, "split=4 must divide top_k=2"),
    "too many": ({"top_k": 9}, "top_k=9 must not exceed experts=8"),
    "negative": ({"dense_layers": -1}, "dense_layers=-1 must not be negative"),
    "width": (
        {"experts": 10, "top_k": 5, "split": 5},
        "split=5 must divide the width of its feed-forward",
    ),
    "all": ({"dense_layers": 3}, "dense_layers=3 must leave some of its 3 layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    words, message = REFUSED[name]
    publish(DENSE["llama"][0], tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        upcycle(tmp_path / "dense", tmp_path / "experts", UpcycleConfig(**words))
    assert not (tmp_path / "experts").exists()


def test_what_has_experts_or_is_full_is_refused(tmp_path: Path) -> None:
    publish(make_config(), tmp_path / "experts")
    with pytest.raises(ValueError, match="it has 6 experts already"):
        upcycle(tmp_path / "experts", tmp_path / "more", UpcycleConfig())
    with pytest.raises(ValueError, match="must be a folder that does not exist yet"):
        upcycle(tmp_path / "experts", tmp_path / "experts", UpcycleConfig())
