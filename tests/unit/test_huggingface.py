"""The model against `transformers`' DeepSeek-V3 and V2 with the same weights: logits and every gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from published_models import EAGER, Wide, fuse, list_gradients, make_counterpart
from small_models import SOFTMAX, make_batch, make_config, make_model
from torch import Tensor
from transformers.modeling_layers import MtpModel

from model.batch import Batch, Denominators, slice_labels
from model.config import ModelConfig
from model.huggingface import Resident, export
from model.rope import tables
from model.transformer import Transformer

YARN = {"factor": 40.0, "original_length": 64, "theta": 1000.0, "mscale": 0.7, "mscale_all_dim": 1.1}
Named = dict[str, torch.nn.Parameter]  # of `transformers`' model
SIZES: dict[str, Any] = {"vocab_size": 41, "hidden": 24, "ffn": 36, "init_std": 0.1}


def configure(moe: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    """Without an auxiliary loss, which `transformers` does not have."""
    return make_config(moe={"ffn": 14, "aux_alpha": 0.0} | (moe or {}), **{**SIZES, **changes})


CONFIGS = {
    "V3": configure(),
    "odd sizes": configure(
        attention={"heads": 3, "q_rank": 11, "kv_rank": 7, "nope_dim": 5, "rope_dim": 6, "v_dim": 9},
        moe={"experts": 15, "groups": 5, "top_groups": 3, "top_k": 4, "ffn": 9, "shared_experts": 3},
        hidden=21,
        ffn=31,
        vocab_size=37,
    ),
    "no query compression": configure(attention={"q_rank": None}),
    "one group": configure(moe={"groups": 1, "top_groups": 1, "top_k": 3}),
    "YaRN": configure(rope=YARN),
    "no shared expert": configure(moe={"shared_experts": 0}),
    "gates not normalised": configure(moe={"normalize_gates": False}),
    "several dense layers": configure(num_layers=4, dense_layers=2),
    "tied": configure(tied=True),
    "all dense": configure(dense_layers=3),
    "no experts": configure(moe={"experts": 0}),
    "top 1": configure(moe={"top_k": 1, "normalize_gates": False}),  # normalised, its router would have no gradient
    "V2 greedy": configure(moe=SOFTMAX | {"groups": 1, "top_groups": 1}, attention={"q_rank": None, "kv_rank": 6}),
    "V2 group-limited": configure(moe=SOFTMAX | {"gate_scale": 4.0}, attention={"kv_rank": 6}, rope=YARN),
}


def build(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Random norms and selection biases as well, except where the layout has no bias."""
    model = make_model(config, dtype)
    if config.moe.score == SOFTMAX["score"]:
        for router in model.routers():
            router.bias.zero_()
    return model


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    """max |a - b| / max |b|, and NaN nowhere."""
    scale = expected.abs().max().clamp(min=1e-30)
    error = ((actual - expected).abs().max() / scale).item()
    assert error <= tolerance, f"{what}: {error:.2e}"


def compare(model: Transformer, named: Named, batch: Batch, expected: list[Tensor], tolerance: float) -> None:
    """Mean cross entropy at each depth and all gradients: ours against ``expected`` logits [B, S, V] of ``named``."""
    depth = model.config.mtp.depth
    count = batch.ids[:, : -1 - depth].numel()
    losses = model(batch, Denominators((float(count),) * (1 + depth), 1.0))
    losses.total.backward()
    labels = [slice_labels(batch, depth, d)[0].flatten() for d in range(1 + depth)]
    wanted = [F.cross_entropy(logits.flatten(0, 1), ids) for logits, ids in zip(expected, labels, strict=True)]
    weights = [1.0] + [model.config.mtp.weight / max(depth, 1)] * depth
    sum(w * loss for w, loss in zip(weights, wanted, strict=True)).backward()  # type: ignore[union-attr]
    assert_close(losses.sums / count, torch.stack(wanted).detach(), tolerance, "loss")

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    gradients = fuse(list_gradients(named), model.config, shapes)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert_close(parameter.grad, gradients[name], tolerance, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_in_float32(name: str) -> None:
    model = build(CONFIGS[name], torch.float32)
    counterpart, batch = make_counterpart(model), make_batch(CONFIGS[name], length=11)
    logits = counterpart(batch.ids[:, :-1]).logits
    assert_close(model.logits(batch.ids[:, :-1]), logits, 1e-5, "logits")
    compare(model, dict(counterpart.named_parameters()), batch, [logits], 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]
    model = build(config, torch.float64)
    counterpart, batch = make_counterpart(model), make_batch(config, length=11)
    # Both compute tables in float32, which may differ in the last bit: here they share one.
    cos, sin = (t.double()[None] for t in tables(config.rope, config.attention.rope_dim, torch.arange(11)))
    shared = torch.complex(cos, sin) if name.startswith("V2") else (cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
    monkeypatch.setattr(counterpart.model.rotary_emb, "forward", lambda x, position_ids: shared)
    with Wide():
        logits = counterpart(batch.ids[:, :-1]).logits
    assert_close(model.logits(batch.ids[:, :-1]), logits, 1e-10, "logits")
    compare(model, dict(counterpart.named_parameters()), batch, [logits], 1e-10)


@pytest.mark.parametrize("depth", [1, 2])
def test_mtp_equal_in_float32(depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against `transformers`' own reading of the published MTP modules, fed with the states before their norms."""
    config = configure(mtp=depth)
    model, batch, length = build(config, torch.float32), make_batch(configure(mtp=depth), length=11), 11
    export(Resident(model), config, tmp_path)
    kind = transformers.DeepseekV3ForCausalLM
    # It knows the module of the published model by its number, 61.
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[34]\..*"])
    counterpart = kind.from_pretrained(tmp_path, **EAGER)
    modules = MtpModel.from_pretrained(counterpart)
    states: list[Tensor] = []
    counterpart.model.norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    for layer in modules.layers:
        layer.post_norm.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))

    logits = [counterpart(batch.ids[:, :length]).logits]
    for d in range(1, depth + 1):
        tokens = batch.ids[:, d : d + length]
        normed = modules.forward_layer(d - 1, states[-1], torch.arange(d, d + length)[None], None, tokens)
        logits.append(counterpart.lm_head(normed))
    named = dict(counterpart.named_parameters())
    for name, parameter in modules.layers.named_parameters():
        d, _, rest = name.replace("mtp_block.", "").replace("post_norm", "shared_head.norm").partition(".")
        named[f"model.layers.{config.num_layers + int(d)}.{rest}"] = parameter
    compare(model, named, batch, logits, 1e-5)
