"""The same model in `transformers`, and its gradients under published names and under ours."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.config import ModelConfig
from model.huggingface import Resident, arrange, publish
from model.huggingface_config import describe
from model.huggingface_names import cut
from model.transformer import Transformer

transformers.utils.logging.disable_progress_bar()
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


def make_counterpart(model: Transformer) -> Any:
    """`transformers`' model with the weights of ``model``, in its dtype, made in memory."""
    dtype = model.embedding.weight.dtype
    values = describe(model.config, str(dtype).removeprefix("torch."))
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    tensors = {name: pending.make() for name, pending in publish(Resident(model), model.config).items()}
    kind = getattr(transformers, values["architectures"][0])
    made = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **EAGER)
    # Since 5.24 routers stay in float32 whatever is asked for; their weights are drawn in it.
    return made.to(dtype) if dtype is torch.float64 else made


def list_gradients(named: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """The gradients under published names: `transformers` stacks the experts of a layer, the layout does not."""
    gradients = {}
    for name, parameter in named.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        stem, dot, kind = name.partition(".experts.")
        if not dot:
            gradients[name] = gradient
        elif kind == "down_proj":
            gradients |= {f"{stem}.experts.{e}.down_proj.weight": g for e, g in enumerate(gradient)}
        else:
            for e, pair in enumerate(gradient):
                gate, up = pair.chunk(2)
                gradients[f"{stem}.experts.{e}.gate_proj.weight"] = gate
                gradients[f"{stem}.experts.{e}.up_proj.weight"] = up
    return gradients


def fuse(
    published: Mapping[str, Tensor], config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Published tensors in our layout. Whatever is missing stays NaN."""
    dtype = next(iter(published.values())).dtype
    ours = {name: torch.full(shape, float("nan"), dtype=dtype) for name, shape in shapes.items()}
    for piece in cut(config, shapes):
        if piece.published in published:
            part = ours[piece.ours][piece.region]
            part.copy_(arrange(published[piece.published], piece.order).view(part.shape))
    return ours


class Wide(TorchFunctionMode):
    """Whoever asks for float32 gets float64: `transformers` converts to float32 in norms, router and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = [torch.float64 if x is torch.float32 else x for x in args]
        kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)
