"""Cutting a micro-batch's graph into stretches, so that its backward can stop and go on where its forward did.

    forward    stretch 0: .. announce dispatch shared | stretch 1: arrive experts combine | stretch 2: collect merge ..
                                               leave ----> enter                  leave ----> enter
    backward                                   slots <---- edges                  slots <---- edges

A stretch is what lies between two waits. Tensors that cross a cut enter as aliases without history: a backward ends at
them and leaves what has come in a slot. The next backward starts from these gradients at the edges where the same
tensors left. A cut keeps no tensor alive (an alias is not saved, an edge is a place in the graph), so a cut graph holds
what autograd would hold without cuts.

Gradients are added in the order of an uncut backward, which goes through the graph from its end to its beginning:
inside a stretch autograd keeps that order, and a tensor that several stretches read is handed on from cut to cut, where
what later ones have added up comes first. A weight that several stretches read goes along the same way
(``model.transformer.Flow``).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Gradients = list[Tensor | None]


class Enter(torch.autograd.Function):
    """Aliases at which a backward ends. ``anchor`` is there for autograd to see something that wants a gradient."""

    @staticmethod
    def forward(ctx, anchor: Tensor, slots: Gradients, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        ctx.slots = slots
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):  # type: ignore[no-untyped-def]
        ctx.slots[:] = gradients
        return (None,) * (2 + len(gradients))


class Stretch:
    """The graph between two cuts."""

    def __init__(self) -> None:
        self._slots: Gradients = []
        self._edges: list[GradientEdge] = []

    @property
    def exits(self) -> int:
        """How many gradients its backward starts from."""
        return len(self._edges)

    def enter(self, carry: Any, anchor: Tensor) -> Any:
        """``carry`` with every tensor that wants a gradient replaced by an alias without history."""
        tensors = _find(carry)
        if not tensors:
            return carry
        self._slots = [None] * len(tensors)
        aliases = Enter.apply(anchor, self._slots, *(tensor.detach() for tensor in tensors))
        return _replace(carry, iter(aliases))

    def leave(self, carry: Any) -> None:
        """Notes where the tensors of ``carry`` come from."""
        self._edges = [get_gradient_edge(tensor) for tensor in _find(carry)]

    def backward(self, gradients: Sequence[Tensor | None]) -> Gradients:
        """The gradients of what left -> those of what entered; weights get theirs as in any backward."""
        roots = [(edge, g) for edge, g in zip(self._edges, gradients, strict=True) if g is not None]
        self._edges = []
        if roots:
            torch.autograd.backward([edge for edge, _ in roots], [g for _, g in roots])
        return self._slots


def _find(carry: Any) -> list[Tensor]:
    """The tensors that want gradients in ``carry``, a tuple of tuples."""
    found = []
    for part in carry if isinstance(carry, tuple) else (carry,):
        if isinstance(part, Tensor):
            if part.requires_grad:
                found.append(part)
        elif isinstance(part, tuple):
            found += _find(part)
    return found


def _replace(carry: Any, others: Iterator[Tensor]) -> Any:
    """``carry`` with these tensors in the place of those that ``_find`` finds; the rest stays."""
    if isinstance(carry, Tensor):
        return next(others) if carry.requires_grad else carry
    if not isinstance(carry, tuple):
        return carry
    parts = [_replace(part, others) for part in carry]
    return type(carry)(*parts) if hasattr(carry, "_fields") else tuple(parts)
