"""Recomputation: what the backward of a compute segment computes again instead of keeping.

    none        keep everything the backward reads
    selective   keep products and the attention core; compute again norms, MLA up-projections, SwiGLU, permutations
    full        keep the segment's input only

Selective is DeepSeek-V3's choice (section 3.2.3). Routing decisions and what came from other ranks are kept whatever
the policy, so that a second forward cannot route a token elsewhere, count it twice or talk to anyone. An operation that
both communicates and multiplies is kept with all that it gives; so whoever splits a gather asks ``is_repeated`` first.
Statistics leave a segment as outputs of its first forward. Built on torch's selective activation checkpointing.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import model.fp8_ops
import model.router  # noqa: F401 (their operators)
from model.config import ModelConfig, Recompute

COMMUNICATION = "shoestring_comm"  # ops of this namespace talk to other ranks
DECISIONS = (torch.ops.shoestring.choose.default,)
# Products, and of a weight that may be computed again its size [inner, outer] by their arguments.
PRODUCTS: dict[Any, Callable[..., tuple[int, int]] | None] = {
    torch.ops.aten.mm.default: lambda a, b: tuple(b.shape),
    torch.ops.shoestring.matmul_wide.default: lambda a, b: tuple(b.shape),
    torch.ops.shoestring.fp8_multiply.default: lambda operands, *_: tuple(operands[2].shape[::-1]),
    torch.ops.shoestring.grouped_rows.default: None,
    torch.ops.shoestring.fp8_rows.default: None,
    torch.ops.shoestring.attention.default: None,
}
Runner = Callable[..., Any]
Sizes = tuple[tuple[int, int], ...]


def list_repeated(config: ModelConfig) -> Sizes | None:
    """Which matrix products a backward computes again: sizes (inner, outer); None: all of them.

    Selectively, products that widen a latent to all heads: cheap to repeat, large to keep.
    """
    if config.recompute is Recompute.none:
        return ()
    if config.recompute is Recompute.full:
        return None
    a = config.attention
    if a.kv_rank is None:
        return ()
    sizes = [(a.kv_rank, a.heads * (a.nope_dim + a.v_dim))]
    if a.q_rank is not None:
        sizes.append((a.q_rank, a.heads * a.width))
    return tuple(sizes)


def is_repeated(shape: tuple[int, int], sizes: Sizes | None) -> bool:
    """Whether a product by a weight [inner, outer], or by one of which it is an equal part, is among ``sizes``."""
    inner, outer = shape
    return sizes is None or any(inner == of and whole % outer == 0 for of, whole in sizes)


def _policy(kept: tuple[Any, ...], repeated: Sizes | None, context: Any, op: Any, *args: Any, **options: Any) -> Any:
    if op.namespace == COMMUNICATION:
        return CheckpointPolicy.MUST_SAVE
    size = PRODUCTS.get(op)
    if op in kept and not (size and is_repeated(size(*args), repeated)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def runner(config: ModelConfig) -> Runner:
    """How a compute segment runs its body: ``runner(body, carry, context)``."""
    if config.recompute is Recompute.none:
        return lambda body, *inputs: body(*inputs)
    kept = DECISIONS if config.recompute is Recompute.full else (*DECISIONS, *PRODUCTS)
    policy = partial(_policy, kept, list_repeated(config))
    contexts = partial(create_selective_checkpoint_contexts, policy)
    return partial(_run, contexts)


def _run(contexts: Callable[[], Any], body: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return body(*inputs)
    return checkpoint(body, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
