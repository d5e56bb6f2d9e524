"""Models and batches small enough to compare number by number, with sizes that divide nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck

from model.batch import Batch, Denominators
from model.build import build, constant
from model.config import AttentionConfig, ModelConfig, MoEConfig, MTPConfig, RopeConfig, ScoreFunction
from model.transformer import Transformer

ATTENTION = {"heads": 2, "q_rank": 7, "kv_rank": 5, "nope_dim": 4, "rope_dim": 6, "v_dim": 3}
GROUPED: dict[str, Any] = {  # instead of the latents of ATTENTION
    "heads": 6, "kv_heads": 2, "q_rank": None, "kv_rank": None, "nope_dim": 0, "rope_dim": 8, "v_dim": 8,
}  # fmt: skip
MOE = {
    "experts": 6,
    "top_k": 2,
    "ffn": 5,
    "shared_experts": 1,
    "groups": 3,
    "top_groups": 2,
    "gate_scale": 2.5,
    "aux_alpha": 0.01,
    "pad": 4,
}


def make_config(
    attention: dict[str, Any] | None = None,
    rope: dict[str, Any] | None = None,
    moe: dict[str, Any] | None = None,
    mtp: int = 0,
    **other: Any,
) -> ModelConfig:
    """A model of three layers, one of them dense, with single fields changed."""
    sizes = {"name": "small", "vocab_size": 19, "num_layers": 3, "hidden": 12, "ffn": 10, "init_std": 0.3}
    return ModelConfig(
        **{**sizes, **other},
        attention=AttentionConfig(**{**ATTENTION, **(attention or {})}),
        rope=RopeConfig(**(rope or {})),
        moe=MoEConfig(**{**MOE, **(moe or {})}),
        mtp=MTPConfig(depth=mtp),
    )


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """A model whose norms and selection biases are random too, so that every parameter shows in the loss."""
    model = build(config, dtype, "cpu", seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if constant(name, tensor) is not None:
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return model


def make_batch(
    config: ModelConfig,
    sequences: int = 2,
    length: int = 7,
    documents: bool = False,
    padding: bool = False,
    seed: int = 0,
) -> Batch:
    """Random text; with ``documents`` two or three a sequence; with ``padding`` some labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    size = (sequences, length + 1 + config.mtp.depth)
    ids = torch.randint(config.vocab_size, size, generator=generator)
    counted = torch.ones(size, dtype=torch.bool)
    if padding:
        counted = torch.rand(size, generator=generator) < 0.6
    numbers = None
    if documents:
        starts = torch.rand((sequences, length), generator=generator) < 0.4
        numbers = starts.cumsum(1).int()
    return Batch(ids, counted, numbers)


def make_denominators(config: ModelConfig, tokens: float = 11.0, sequences: float = 3.0) -> Denominators:
    """Denominators that are no count of any batch, a different one at each depth."""
    return Denominators(tuple(tokens + 2 * d for d in range(1 + config.mtp.depth)), sequences)


def check_gradients(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> bool:
    """Hand-written gradients against finite differences in float64, a hundred times closer than torch asks for."""
    return gradcheck(function, inputs, atol=1e-7, rtol=1e-7)


SOFTMAX = {"score": ScoreFunction.softmax, "normalize_gates": False, "gate_scale": 1.0}
YARN = {"factor": 4.0, "original_length": 32, "mscale": 0.7, "mscale_all_dim": 1.3, "theta": 50.0, "beta_fast": 4.0}
