"""What the actions of a pipeline schedule do with a model: the work of a step, and that of an evaluation.

    F   the stage's forward; its input becomes a leaf, its output goes on without history
    B   from the stage's own part of the loss and the gradient of its output, to its input
    I   the same, with the large weight gradients put off
    W   computes them, in the order in which they were put off

Between its F and its B a micro-batch keeps what autograd keeps; every stage but the last gives away its output at once.
Shapes: an activation is [B, S / (cp tp), H].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.batch import Batch, Denominators, Losses
from model.linear import WeightGradient
from parallel.pipeline.action import Op, parts
from parallel.pipeline.lower import Exchange, Step
from training.engine import Hidden


class Differentiator(Protocol):
    """What a step needs of an engine."""

    def forward(self, stage: int, *args: Any) -> Any:
        """See ``Engine``."""

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """See ``Engine``."""

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """See ``Engine``."""

    def finishing(self, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        """See ``Engine``."""

    def finished(self, stage: int) -> None:
        """See ``Engine``."""


class Sums(NamedTuple):
    """Sums over the micro-batches of a step."""

    losses: Tensor  # [1 + D] cross entropy in nats
    aux: Tensor  # auxiliary loss over sequences and layers
    load: Tensor  # [routed layers, E] tokens per expert


class Shapes(NamedTuple):
    """Of what travels between stages, and of a loss."""

    length: int  # tokens of a sequence on this rank
    hidden: int
    losses: int  # 1 + D
    dtype: torch.dtype
    device: torch.device

    def allocate(self, batch: Batch) -> Tensor:
        """Memory for an activation of ``batch``."""
        return torch.empty(len(batch.ids), self.length, self.hidden, dtype=self.dtype, device=self.device)


class Pending(NamedTuple):
    """A micro-batch between its forward and its backward."""

    x: Tensor | None
    losses: Losses
    deferred: list[WeightGradient] | None


class Training:
    """Forward and backward of a step's micro-batches; ``sums`` when they are done: a ``parallel.pipeline.run.Work``."""

    def __init__(
        self,
        engine: Differentiator,
        batches: Sequence[Batch],
        denominators: Denominators,
        shapes: Shapes,
        steps: Sequence[Step],
    ) -> None:
        self._engine, self._batches, self._denominators, self._shapes = engine, batches, denominators, shapes
        actions = [action for step in steps if not isinstance(step, Exchange) for action in parts(step)]
        self._split = {action[1:] for action in actions if action.op is Op.I}  # whose weight gradients are put off
        self._last = {action.stage: action for action in actions if action.op in (Op.B, Op.W)}
        self._pending: dict[tuple[int, int], Pending] = {}
        self.sums: Sums | None = None

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        """See ``Work``."""
        x = None if x is None else x.requires_grad_()
        deferred: list[WeightGradient] | None = [] if (stage, microbatch) in self._split else None
        losses: Losses = self._engine.forward(stage, self._batches[microbatch], self._denominators, deferred, x)
        self._pending[stage, microbatch] = Pending(x, losses, deferred)
        here = Sums(losses.sums, losses.aux, losses.load)
        self.sums = here if self.sums is None else Sums(*(a + b for a, b in zip(self.sums, here, strict=True)))
        return None if losses.hidden is None else losses.hidden.detach()

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        """See ``Work``."""
        x, losses, deferred = self._pending.pop((stage, microbatch))
        assert (losses.hidden is None) == (gradient is None), f"stage {stage}: what went on comes back as a gradient"
        hidden = None if losses.hidden is None or gradient is None else (losses.hidden, gradient)
        if self._last[stage] == (Op.B, stage, microbatch):
            self._engine.finishing(stage)
        self._engine.backward(stage, losses.total, hidden)
        if deferred is not None:
            self._pending[stage, microbatch] = Pending(None, losses._replace(hidden=None), deferred)
        return None if x is None else x.grad

    @torch.no_grad()
    def weight(self, stage: int, microbatch: int) -> None:
        """See ``Work``."""
        deferred = self._pending.pop((stage, microbatch)).deferred
        assert deferred is not None
        if self._last[stage] == (Op.W, stage, microbatch):
            self._engine.finishing(stage, [weight for weight, _ in deferred])
        while deferred:
            parameter, compute = deferred.pop(0)
            assert isinstance(parameter, nn.Parameter)
            self._engine.accumulate(parameter, compute())

    def finished(self, stage: int) -> None:
        """See ``Work``."""
        self._engine.finished(stage)

    def allocate(self, microbatch: int) -> Tensor:
        """See ``Work``."""
        return self._shapes.allocate(self._batches[microbatch])


class Evaluation:
    """Forwards alone; ``losses`` [1 + D] in float64 when they are done. See ``parallel.pipeline.run.Work``."""

    def __init__(self, engine: Differentiator, batches: Sequence[Batch], shapes: Shapes) -> None:
        self._engine, self._batches, self._shapes = engine, batches, shapes
        # What a loss would be divided by for a backward: the sums that are read here come undivided.
        self._denominators = Denominators((1.0,) * shapes.losses, 1.0)
        self.losses = torch.zeros(shapes.losses, dtype=torch.float64, device=shapes.device)

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        """See ``Work``."""
        losses: Losses = self._engine.forward(stage, self._batches[microbatch], self._denominators, None, x)
        self.losses += losses.sums.detach()
        return None if losses.hidden is None else losses.hidden.detach()

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        """There is none."""
        raise AssertionError("an evaluation has no backward")

    def weight(self, stage: int, microbatch: int) -> None:
        """There is none."""
        raise AssertionError("an evaluation has no backward")

    def finished(self, stage: int) -> None:
        """There is no gradient."""

    def allocate(self, microbatch: int) -> Tensor:
        """See ``Work``."""
        return self._shapes.allocate(self._batches[microbatch])
