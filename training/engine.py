"""What data parallelism is to the rest of training: who sums gradients, who updates weights, who keeps which state.

    begin -> (forward -> backward) for every micro-batch of every stage -> finished, once a stage -> step
    finishing, before the last backward of a stage                         settle, before anybody else reads weights

An engine takes the parameters of the stages that this rank holds. Gradients are sums over all ranks that hold a
parameter, never averages: every loss comes divided by a denominator of the whole global batch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from model.transformer import Transformer
from parallel.overlap.program import Program, Unrolled, unroll
from training.chunk import Chunk

Hidden = tuple[Tensor, Tensor] | None  # what a stage gave to the next one, and its gradient
Unrolling = Program[Unrolled]  # a forward that stops wherever something is on its way


class Update(NamedTuple):
    """What a step did: the same on every rank."""

    norm: float  # of the gradient of the whole model, before clipping
    factor: float  # what clipping multiplied the gradient by, at most 1
    applied: bool  # False: the gradient was not finite (or the caller said so) and nothing has changed


class State(NamedTuple):
    """What an engine needs to go on, besides the model's buffers."""

    steps: int  # updates applied
    chunks: list[Chunk]  # of "master/<parameter>", "m/<parameter>" and "v/<parameter>"


T = TypeVar("T")


class Share(NamedTuple, Generic[T]):
    """What gradients belong to: the stages of this rank that add to them, and whether other pipeline ranks do too."""

    users: tuple[int, ...]
    crosses: bool
    of: T

    def is_shared(self) -> bool:
        """Whether there are more stages than one, here or elsewhere."""
        return self.crosses or len(self.users) > 1


def name_parameters(stages: Mapping[int, nn.Module]) -> tuple[dict[str, nn.Parameter], dict[str, tuple[int, ...]]]:
    """Every parameter by its name, and the stages that have it."""
    named: dict[str, nn.Parameter] = {}
    users: dict[str, tuple[int, ...]] = {}
    for stage, module in sorted(stages.items()):
        for name, parameter in module.named_parameters():
            named[name] = parameter
            users[name] = (*users.get(name, ()), stage)
    return named, users


class Engine(Protocol):
    """Data parallelism. Calls of ``finished``, ``step`` and ``load`` are collective."""

    def begin(self) -> None:
        """Forgets the gradients: those of the next step start here."""

    def forward(self, stage: int, *args: Any) -> Any:
        """Calls the module of ``stage``."""

    def unroll(self, stage: int, *args: Any) -> Unrolling:
        """``forward``, but stopping wherever something is on its way. Only the native engine's."""

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """Adds the gradients of ``loss``, and of what went to the next stage, to the step's."""

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Adds ``grad`` (the parameter's shape, any float dtype): for gradients that no backward computes."""

    def finishing(self, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        """The step's last backward of ``stage`` begins: sums may start inside of it. Nothing depends on this call.

        ``coming``: that backward was before, and what is left is what it has put off, a gradient for each of these
        parameters in any order, one that is listed twice gets two.
        """

    def finished(self, stage: int) -> None:
        """The step's last gradient of ``stage`` is there: its sum over the parameter's holders may start."""

    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite."""

    def settle(self) -> None:
        """Waits for all that is under way, new weights above all, which ``step`` may have left so.

        Modules' own calls wait for theirs by themselves; whoever reads parameters otherwise calls this first, and so
        does who is about to leave.
        """

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""

    def held(self) -> list[Chunk]:
        """All of masters and moments that this rank has, views: those of ``state``, and what other ranks have too."""

    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, in this layout or another, and sets the parameters from the masters.

        Raises ValueError naming what is missing, unexpected or of another shape.
        """


class Waiting:
    """Which gradients of a step are complete, as the stages of a rank finish.

    Those of one stage with that stage, those that several of them have with the last of these, and what other pipeline
    ranks hold too with the last stage of all: the stages of the others may finish in another order.
    """

    def __init__(self, stages: Iterable[int]) -> None:
        self._all, self._left = frozenset(stages), set(stages)

    def begin(self) -> None:
        """A step begins: nothing is finished."""
        self._left = set(self._all)

    def finish(self, stage: int, shared: Iterable[Share[T]]) -> list[T]:
        """``stage`` is finished. Returns what becomes complete with it."""
        self._left.discard(stage)
        return [
            of
            for users, crosses, of in shared
            if (stage in users and not crosses and self._left.isdisjoint(users)) or (crosses and not self._left)
        ]

    def __bool__(self) -> bool:
        """Whether stages are left."""
        return bool(self._left)


def unroll_stage(module: nn.Module, *args: Any) -> Unrolling:
    """The forward of a stage as a program; ``args`` are those of ``Transformer.forward``."""
    assert isinstance(module, Transformer)
    return unroll(module, *args)


class Seed(torch.autograd.Function):
    """A scalar whose gradient by ``tensor`` is ``gradient``.

    Of a root with a gradient torch compares the shapes, for which it loads sympy into every rank of a pipeline.
    """

    @staticmethod
    def forward(ctx, tensor: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        assert tensor.shape == gradient.shape
        ctx.save_for_backward(gradient)
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return ctx.saved_tensors[0], None


def differentiate(loss: Tensor, hidden: Hidden) -> None:
    """The backward of a stage: from its own part of the loss, if any, and from what the next stage sent back."""
    roots = [loss] if loss.requires_grad else []
    roots += [Seed.apply(*hidden)] if hidden is not None else []
    torch.autograd.backward(roots)
