"""What a model computes with: a dtype, and for some of its products a recipe of FP8. Precision is a swap.

    attention.mla.*, gqa.*, dense and shared feed-forward networks    products in FP8
    routed experts                                             the same, and what travels to them
    embedding, head, router, norms, attention core, what joins a state and an embedding for MTP    as they are

as DeepSeek-V3 has it (section 3.3.1). ``swap`` replaces modules by name, before a model is cut over ranks; no forward
asks for a precision.
"""

from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn

from model.experts import Experts
from model.fp8 import Recipe
from model.fp8_experts import FP8Experts
from model.fp8_linear import FP8Linear
from model.linear import Linear


class Numerics(NamedTuple):
    """The dtype of parameters and activations, and the recipe of products in FP8."""

    dtype: torch.dtype
    recipe: Recipe | None = None


AS_THEY_ARE = ("head", "*.project")
# Quantised along tokens once more for a weight gradient, or sent to experts as they are: powers of two lose nothing.
ROUNDED = ("*.mla.o", "*.gqa.o", "*.shared.gate_up")


def swap(model: nn.Module, recipe: Recipe) -> None:
    """Replaces the modules of ``model`` that have products in FP8; parameters and their names stay."""
    for name, module in list(model.named_modules()):
        if type(module) is Experts:
            _replace(model, name, FP8Experts(module, recipe))
        elif type(module) is Linear and not _matches(name, AS_THEY_ARE):
            rounded = recipe._replace(activations=recipe.activations.rounded())
            _replace(model, name, FP8Linear(module, rounded if _matches(name, ROUNDED) else recipe))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)
