"""What the actions of a pipeline schedule do with a model: the work of a step, and that of an evaluation.

    F   the stage's forward; its input becomes a leaf, its output goes on without history
    B   from the stage's own part of the loss and the gradient of its output, to its input
    I   the same, with the large weight gradients put off
    W   computes them, in the order in which they were put off

A forward and a backward that a schedule pairs are programs (parallel/overlap/program.py) and take turns. Where tokens
travel, every B leaves its weight gradients to its own waits and those of what comes next (parallel/overlap/backlog.py).

Between its F and its B a micro-batch keeps what autograd keeps; every stage but the last gives away its output at once.
Shapes: an activation is [B, S / (cp tp), H].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from model.batch import Batch, Denominators, Losses
from model.linear import WeightGradient
from parallel.overlap.backlog import Backlog
from parallel.overlap.execute import interleave
from parallel.overlap.program import Program, Tape, name, rewind
from parallel.pipeline.action import Action, Op, Overlap, parts
from parallel.pipeline.lower import Exchange, Step
from parallel.pipeline.run import Work
from training.engine import Hidden, Unrolling


class Forwards(Protocol):
    """What an evaluation needs of an engine."""

    def forward(self, stage: int, *args: Any) -> Any:
        """See ``Engine``."""


class Differentiator(Forwards, Protocol):
    """What a step needs of an engine."""

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """See ``Engine``."""

    def unroll(self, stage: int, *args: Any) -> Unrolling:
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


class Mode(NamedTuple):
    """What is done while something is on its way."""

    overlap: bool = True  # the other half of a pair; else nothing at all
    fill: bool = True  # and weight gradients of backwards, which are put off for that


class Pending(NamedTuple):
    """A micro-batch between its forward and its backward."""

    x: Tensor | None
    losses: Losses
    deferred: list[WeightGradient] | None
    tape: Tape | None = None  # of a forward that was a program


class Training(Work):
    """Forward and backward of a step's micro-batches; ``sums`` when they are done."""

    def __init__(
        self,
        engine: Differentiator,
        batches: Sequence[Batch],
        denominators: Denominators,
        shapes: Shapes,
        steps: Sequence[Step],
        mode: Mode,
    ) -> None:
        self._engine, self._batches, self._denominators, self._shapes = engine, batches, denominators, shapes
        pairs = [step for step in steps if isinstance(step, Overlap)] if mode.overlap else []
        actions = [action for step in steps if not isinstance(step, Exchange) for action in parts(step)]
        # What is paired once, going or coming back, is a program both times.
        self._programs = {action[1:] for pair in pairs for action in parts(pair)}
        # Whose weight gradients are put off; those of an I until its W.
        put_off = (Op.I, Op.B) if mode.overlap and mode.fill else (Op.I,)
        self._split = {action[1:] for action in actions if action.op in put_off}
        self._last = {action.stage: action for action in actions if action.op in (Op.B, Op.W)}
        self._pending: dict[tuple[int, int], Pending] = {}
        self._backlog = Backlog(self._accumulate)
        self.sums: Sums | None = None

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        """See ``Work``."""
        if (stage, microbatch) in self._programs:
            return interleave([self._unroll(stage, microbatch, x)])[0]
        x = None if x is None else x.requires_grad_()
        deferred: list[WeightGradient] | None = [] if (stage, microbatch) in self._split else None
        losses: Losses = self._engine.forward(stage, self._batches[microbatch], self._denominators, deferred, x)
        self._pending[stage, microbatch] = Pending(x, losses, deferred)
        return self._count(losses)

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        """See ``Work``."""
        if (stage, microbatch) in self._programs:
            return interleave([self._rewind(stage, microbatch, gradient, split)])[0]
        x, losses, _ = self._turn(stage, microbatch, split)
        assert (losses.hidden is None) == (gradient is None), f"stage {stage}: what went on comes back as a gradient"
        hidden = None if losses.hidden is None or gradient is None else (losses.hidden, gradient)
        self._engine.backward(stage, losses.total, hidden)
        return None if x is None else x.grad

    def pair(
        self, forward: Action, x: Tensor | None, backward: Action, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See ``Work``."""
        if not self._programs:
            return super().pair(forward, x, backward, gradient)
        back = self._rewind(*backward[1:], gradient, backward.op is Op.I)
        back, made = interleave((name(back, backward), name(self._unroll(*forward[1:], x), forward)))
        return made, back

    @torch.no_grad()
    def weight(self, stage: int, microbatch: int) -> None:
        """See ``Work``."""
        self._backlog.drain()
        deferred = self._pending.pop((stage, microbatch)).deferred
        assert deferred is not None
        if self._last[stage] == (Op.W, stage, microbatch):
            self._engine.finishing(stage, [weight for weight, _ in deferred])
        while deferred:
            self._accumulate(deferred.pop(0))

    def idle(self, most: int | None = None) -> None:
        """Does what was put off: see ``parallel.overlap.lanes.Lanes``."""
        self._backlog.idle(most)

    def finished(self, stage: int) -> None:
        """See ``Work``."""
        self._backlog.drain()
        self._engine.finished(stage)

    def allocate(self, microbatch: int) -> Tensor:
        """See ``Work``."""
        return self._shapes.allocate(self._batches[microbatch])

    def _unroll(self, stage: int, microbatch: int, x: Tensor | None) -> Program[Tensor | None]:
        """The forward as a program."""
        batch, x = self._batches[microbatch], None if x is None else x.requires_grad_()
        deferred: list[WeightGradient] | None = [] if (stage, microbatch) in self._split else None
        losses, tape = yield from self._engine.unroll(stage, batch, self._denominators, deferred, x)
        # The tape has the history: what the stage has made need not stay.
        kept = losses._replace(total=torch.ones_like(losses.total), hidden=None)
        self._pending[stage, microbatch] = Pending(None, kept, deferred, tape)
        return self._count(losses)

    def _rewind(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Program[Tensor | None]:
        """The backward as a program."""
        _, losses, tape = self._turn(stage, microbatch, split)
        assert tape is not None
        roots = [losses.total] if gradient is None else [losses.total, gradient]
        # A stage without a loss of its own, and none before it to ask for, has fewer.
        back = yield from rewind(tape, roots[len(roots) - tape[-1].exits :])
        return back[0] if back else None

    def _turn(self, stage: int, microbatch: int, split: bool) -> tuple[Tensor | None, Losses, Tape | None]:
        """A micro-batch is about to go back: what its forward has left. Says where its weight gradients will be."""
        x, losses, deferred, tape = self._pending.pop((stage, microbatch))
        if self._last[stage] == (Op.B, stage, microbatch):
            self._backlog.drain()
            self._engine.finishing(stage)
        if split:
            self._pending[stage, microbatch] = Pending(None, losses._replace(hidden=None), deferred)
        elif deferred is not None:
            self._backlog.watch(str(Action(Op.W, stage, microbatch)), deferred)
        return x, losses, tape

    def _count(self, losses: Losses) -> Tensor | None:
        """Adds to the sums; gives what goes to the next stage."""
        here = Sums(losses.sums, losses.aux, losses.load)
        self.sums = here if self.sums is None else Sums(*(a + b for a, b in zip(self.sums, here, strict=True)))
        return None if losses.hidden is None else losses.hidden.detach()

    @torch.no_grad()
    def _accumulate(self, gradient: WeightGradient) -> None:
        assert isinstance(gradient.weight, nn.Parameter)
        self._engine.accumulate(gradient.weight, gradient.compute())


class Evaluation(Work):
    """Forwards alone; ``losses`` [1 + D] in float64 when they are done. See ``parallel.pipeline.run.Work``."""

    def __init__(self, engine: Forwards, batches: Sequence[Batch], shapes: Shapes) -> None:
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

    def idle(self, most: int | None = None) -> None:
        """There is no gradient."""

    def finished(self, stage: int) -> None:
        """There is no gradient."""

    def allocate(self, microbatch: int) -> Tensor:
        """See ``Work``."""
        return self._shapes.allocate(self._batches[microbatch])
