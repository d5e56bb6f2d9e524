"""The one interpreter: a rank's program, step by step. It knows no schedule's name, and neither a model nor a loss.

    0F0          y = work.forward(stage 0, micro-batch 0, x)       y is held as the activation 0F0
    [0F0>1]      a send takes what is held; a receive holds what is on its way, and whoever reads it waits for it
    0B0 0I0      the gradient of stage 0's output -> the gradient of its input, held as 0B0
    0W0          weight gradients that an I has put off
    1F1&1B0      both, as the work thinks fit: what one sends may travel while the other computes

Training, evaluation and measurement differ in their ``Work`` alone; with one rank there is nothing to send, and the
program is gradient accumulation.

Exchanges start without waiting. The order of a lowered program cannot deadlock even where every exchange waits for its
peers (parallel/pipeline/lower.py), so it is safe to wait for an earlier one at any time: what is sent is let go
``WINDOW`` exchanges later.
"""

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor

from model.mark import mark
from parallel.doing import Doing, doing
from parallel.pipeline.action import Action, Compute, Op, Overlap, parts
from parallel.pipeline.lower import Exchange, Kind, Step, What
from parallel.pipeline.trace import Span

WINDOW = 4  # exchanges whose sends may be under way
Name = tuple[What, int, int]  # what it is, the stage that made it, its micro-batch


class Work(Protocol):
    """What actions do."""

    def forward(self, stage: int, microbatch: int, x: Tensor | None) -> Tensor | None:
        """The input of ``stage``, None for the first -> its output, None for the last."""

    def backward(self, stage: int, microbatch: int, gradient: Tensor | None, split: bool) -> Tensor | None:
        """The gradient of a stage's output -> of its input. With ``split``, its weight gradients are put off."""

    def weight(self, stage: int, microbatch: int) -> None:
        """The weight gradients that were put off."""

    def finished(self, stage: int) -> None:
        """The last gradient of ``stage`` in this step is there."""

    def allocate(self, microbatch: int) -> Tensor:
        """Memory for an activation of a micro-batch, or for its gradient."""

    def pair(
        self, forward: Action, x: Tensor | None, backward: Action, gradient: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """A forward and the backward of another micro-batch, together; unless a work knows better, in turns."""
        made = self.forward(*forward[1:], x)
        return made, self.backward(*backward[1:], gradient, backward.op is Op.I)


class UnderWay(NamedTuple):
    """A tensor on its way, here or from here. To be waited for once: gloo would wait for a second one."""

    buffer: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """The tensor, once it has arrived."""
        with Doing(waiting=True):
            self.work.wait()
        return self.buffer


class Interpreter:
    """Runs programs of one rank."""

    def __init__(self, group: dist.ProcessGroup | None, rank: int = 0) -> None:
        """``group``: the ranks of the pipeline in order, of which this is ``rank``; None where it is the only one."""
        self._group, self._rank = group, rank
        self._batches = group is not None and dist.get_backend(group) != dist.Backend.GLOO
        self._held: dict[Name, Tensor | UnderWay] = {}
        self._leaving: deque[list[UnderWay]] = deque()

    def run(
        self,
        steps: Sequence[Step],
        work: Work,
        stop: Callable[[], bool] | None = None,
        spans: list[Span] | None = None,
    ) -> bool:
        """Runs ``steps``; False if ``stop``, for a lone rank, said so before a forward. ``spans`` gets what ran."""
        last, done = _find_last(steps), list[int]()
        began = perf_counter()
        for number, step in enumerate(steps):
            if isinstance(step, Exchange):
                self._exchange(step, work)
                continue
            # Only now: what the stage's last action made has left, and whoever waits for it goes on.
            _finish(done, work)
            actions = parts(step)
            if actions[0].op is Op.F and stop is not None and stop():
                self._held.clear()
                return False
            read = [self._read(action) for action in actions]
            start = perf_counter()
            with mark(str(step)):
                made = self._act(step, work, read)
            self._hold(actions, made)
            if spans is not None:
                spans.append(Span(self._rank, step, start - began, perf_counter() - began))
            done += [action.stage for action in actions if last.get(action.stage) == (number, action)]
        _finish(done, work)
        while self._leaving:
            self._release()
        assert not self._held, f"made and never read: {sorted(self._held)}"
        return True

    @doing("what another stage sends for {action}")
    def _read(self, action: Action) -> Tensor | None:
        """What an action needs of other stages, once it is there."""
        op, stage, microbatch = action
        if op is Op.W:
            return None
        if op is Op.F:
            return self._take((What.activation, stage - 1, microbatch)) if stage else None
        return self._take((What.gradient, stage + 1, microbatch), missing=True)

    @doing("{step}")
    def _act(self, step: Compute, work: Work, read: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        if isinstance(step, Overlap):
            return work.pair(step.forward, read[0], step.backward, read[1])
        op, stage, microbatch = step
        if op is Op.W:
            work.weight(stage, microbatch)
            return (None,)
        if op is Op.F:
            return (work.forward(stage, microbatch, read[0]),)
        return (work.backward(stage, microbatch, read[0], op is Op.I),)

    def _hold(self, actions: Sequence[Action], made: Sequence[Tensor | None]) -> None:
        for (op, stage, microbatch), tensor in zip(actions, made, strict=True):
            if tensor is not None:
                self._held[What.activation if op is Op.F else What.gradient, stage, microbatch] = tensor

    def _take(self, name: Name, missing: bool = False) -> Tensor | None:
        """What is held; the last stage gets no gradient from behind."""
        held = self._held.pop(name, None) if missing else self._held.pop(name)
        return held.wait() if isinstance(held, UnderWay) else held

    def _exchange(self, exchange: Exchange, work: Work) -> None:
        tensors = [self._take(each[1:4]) if each.kind is Kind.send else work.allocate(each.microbatch)
                   for each in exchange.transfers]  # fmt: skip
        leaving = []
        started = self._start(exchange, [tensor.contiguous() for tensor in tensors if tensor is not None])
        for transfer, under_way in zip(exchange.transfers, started, strict=True):
            if transfer.kind is Kind.send:
                leaving.append(under_way)
            else:
                self._held[transfer[1:4]] = under_way
        if leaving:
            self._leaving.append(leaving)
            while len(self._leaving) > WINDOW:
                self._release()

    def _start(self, exchange: Exchange, tensors: list[Tensor]) -> list[UnderWay]:
        """The transfers of an exchange, each with its tensor, under way."""
        group = self._group
        assert group is not None
        ends = list(zip(exchange.transfers, tensors, strict=True))
        if not self._batches:
            # Without batches each call is its own. Asked directly, the group spares the checks of ``dist.isend`` and
            # ``irecv``, which take as long as the calls themselves.
            calls = [(group.send if transfer.kind is Kind.send else group.recv) for transfer in exchange.transfers]
            return [UnderWay(tensor, call([tensor], transfer.peer, 0))
                    for call, (transfer, tensor) in zip(calls, ends, strict=True)]  # fmt: skip
        started = dist.batch_isend_irecv([
            dist.P2POp(dist.isend if kind is Kind.send else dist.irecv, tensor, group=group, group_peer=peer)
            for (kind, *_, peer), tensor in ends
        ])  # fmt: skip
        # A backend may make one work of the whole batch.
        works = started if len(started) == len(ends) else started * len(ends)
        return [UnderWay(tensor, each) for tensor, each in zip(tensors, works, strict=True)]

    def _release(self) -> None:
        for leaving in self._leaving.popleft():
            leaving.wait()


def _finish(done: list[int], work: Work) -> None:
    while done:
        work.finished(done.pop(0))


def _find_last(steps: Sequence[Step]) -> dict[int, tuple[int, Action]]:
    """Where each stage has its last backward or weight gradient: the number of the step, and the action."""
    return {
        action.stage: (number, action)
        for number, step in enumerate(steps)
        if not isinstance(step, Exchange)
        for action in parts(step)
        if action.op in (Op.B, Op.W)
    }
