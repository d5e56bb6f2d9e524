"""What a run of a case leaves behind, on the plain model or on a rank of a layout, and what reads it off a model.

Shapes: L routed layers, N sequences, S tokens, T = N S, K choices, E experts, D depth of multi-token prediction.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.router import Router, Routing
from model.transformer import Transformer
from training.chunk import Chunk
from training.engine import Update
from training.gather import name_tensors
from training.proof.case import Case

Choices = dict[tuple[int, int], Tensor]  # experts [n, S, K] by routed layer and micro-batch


class Step(NamedTuple):
    """What a step reports."""

    sums: Tensor  # [1 + D] cross entropy
    aux: Tensor  # auxiliary loss before its weight
    load: Tensor  # [L, E] int64
    update: Update


class Trace(NamedTuple):
    """A run. Tensors by name are a rank's own parts; so is the routing."""

    initial: dict[str, Tensor]  # as built
    read: Tensor  # [N] int64, how often each sequence of the first step was read
    routing: Choices  # of the first step's tokens; the plain model has one micro-batch, 0
    loss: Tensor  # of the first step: the scalar that is differentiated
    gradients: dict[str, Tensor]  # of the first step, before clipping, summed over holders without an engine
    moments: list[Chunk]  # the first moments after the first step: what the engine took for its gradients
    steps: list[Step]
    final: dict[str, Tensor]  # parameters and buffers after the last step


def vary_rate(case: Case, step: int) -> float:
    """Another rate each step: an update that is a step late would show."""
    return case.optimizer.lr * (1 + step)


@contextmanager
def watch_routers(model: Transformer) -> Iterator[list[Tensor]]:
    """Collects the choices [T, K] of every router that runs inside; not those of recomputation, in the backward."""
    seen: list[Tensor] = []

    def keep(module: Router, inputs: object, routing: Routing) -> None:
        seen.append(routing.experts)

    handles = [router.register_forward_hook(keep) for router in model.routers()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def name_choices(model: Transformer, seen: Sequence[Tensor], microbatch: int, sequences: int) -> Choices:
    """[T, K] of each of a stage's routers -> [n, S, K] by its row of the load and the micro-batch."""
    rows = zip(model.rows(), seen, strict=True)
    return {(row, microbatch): choices.unflatten(0, (sequences, -1)) for row, choices in rows}


def take_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, zero where nothing flowed, and forgets it."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def copy_tensors(stages: Iterable[Transformer]) -> dict[str, Tensor]:
    """Every parameter and buffer by its global name."""
    return {name: tensor.clone() for name, tensor in name_tensors(stages).items()}
