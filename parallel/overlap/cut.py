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

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Gradients = list[Tensor | None]


class Enter(torch.autograd.Function):
    """An alias at which a backward ends. ``anchor`` is there for autograd to see something that wants a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, slots: Gradients, place: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.slots, ctx.place = slots, place
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        ctx.slots[ctx.place] = g
        return None, None, None, None


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

        def alias(x: Tensor) -> Tensor:
            self._slots.append(None)
            return Enter.apply(x.detach(), anchor, self._slots, len(self._slots) - 1)

        return _map(alias, carry)

    def leave(self, carry: Any) -> None:
        """Notes where the tensors of ``carry`` come from."""

        def note(x: Tensor) -> Tensor:
            self._edges.append(get_gradient_edge(x))
            return x

        _map(note, carry)

    def backward(self, gradients: Sequence[Tensor | None]) -> Gradients:
        """The gradients of what left -> those of what entered; weights get theirs as in any backward."""
        roots = [(edge, g) for edge, g in zip(self._edges, gradients, strict=True) if g is not None]
        self._edges = []
        if roots:
            torch.autograd.backward([edge for edge, _ in roots], [g for _, g in roots])
        return self._slots


def _map(change: Callable[[Tensor], Tensor], carry: Any) -> Any:
    """``carry``, a tuple of tuples, with its tensors that want gradients changed; the rest stays."""
    if isinstance(carry, Tensor):
        return change(carry) if carry.requires_grad else carry
    if not isinstance(carry, tuple):
        return carry
    changed = [_map(change, part) for part in carry]
    return type(carry)(*changed) if hasattr(carry, "_fields") else tuple(changed)
