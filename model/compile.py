"""torch.compile, one compute segment at a time.

Segments of one kind share their code, so a model of any depth compiles a handful of graphs: attention with and without
a router, shared experts, routed ones, merge, the dense feed-forward part. Communication stays outside; so do runs that
put weight gradients off (``deferred``) and generation (its cache grows every token), which execute the same segments
eagerly.

How many rows arrive from other ranks differs in every step: those sizes are marked dynamic from the first call.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from model.attention import Context
from model.block import COMPUTE
from model.exchange import Arrived
from model.transformer import Transformer

GRAPHS = 64  # a segment is compiled anew for each shape and for evaluation; torch gives up after 8 by default


def compile_segments(model: Transformer, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile every compute segment of ``model`` in place; the first call of each kind pays for it."""
    torch._dynamo.config.recompile_limit = GRAPHS
    for module in model.modules():
        if isinstance(module, COMPUTE):
            eager = module.forward
            compiled = torch.compile(eager, dynamic=False, fullgraph=True, backend=backend)
            module.forward = partial(_run, eager, compiled)  # type: ignore[method-assign]


def _run(eager: Callable[..., Any], compiled: Callable[..., Any], *carry: Any) -> Any:
    """Through the compiled segment, unless the list or the cache in the context, which comes last, would have to be
    compiled with it.
    """
    first, context = carry[0], carry[-1]
    assert isinstance(context, Context)
    plain = context.deferred is None and context.cache is None
    if isinstance(first, Arrived) and (home := first.layout.home) is not None:
        for tensor in (first.tokens, first.gates, *first.layout.copies, home.copies.source, home.copies.slots):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return (compiled if plain else eager)(*carry)
