"""The model against `transformers`' of every family with the same weights: logits and every gradient."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import transformers
from family_models import NAMED, configure, is_softmax
from published_models import EAGER, Wide, fuse, list_gradients, make_counterpart
from small_models import make_batch, make_model
from torch import Tensor
from transformers.modeling_layers import MtpModel

from model.batch import Batch, Denominators, slice_labels
from model.config import ModelConfig
from model.huggingface import Resident, export
from model.rope import tables
from model.transformer import Transformer

Named = dict[str, torch.nn.Parameter]  # of `transformers`' model


def build(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Random norms and selection biases as well, except where the layout has no bias."""
    model = make_model(config, dtype)
    if is_softmax(config):
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


@pytest.mark.parametrize("name", NAMED)
def test_equal_in_float32(name: str) -> None:
    model = build(NAMED[name], torch.float32)
    counterpart, batch = make_counterpart(model), make_batch(NAMED[name], length=11)
    assert counterpart.config.model_type == name.partition(":")[0]
    logits = counterpart(batch.ids[:, :-1]).logits
    assert_close(model.logits(batch.ids[:, :-1]), logits, 1e-5, "logits")
    compare(model, dict(counterpart.named_parameters()), batch, [logits], 1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_equal_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = NAMED[name]
    model = build(config, torch.float64)
    counterpart, batch = make_counterpart(model), make_batch(config, length=11)
    # Both compute tables in float32, which may differ in the last bit: here they share one.
    cos, sin = (t.double()[None] for t in tables(config.rope, config.attention.rope_dim, torch.arange(11)))
    shared = torch.complex(cos, sin) if name.startswith("deepseek_v2") else (cos.repeat(1, 1, 2), sin.repeat(1, 1, 2))
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
