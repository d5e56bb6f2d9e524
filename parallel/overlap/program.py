"""The forward and the backward of a micro-batch as programs that stop wherever something is on its way.

    unroll   embedding attention announce dispatch shared | arrive experts combine | collect merge attention ..
    rewind   .. merge collect | combine experts arrive | shared dispatch attention embedding

A program computes up to its next wait for rows and yields. Whoever runs it goes on with it at once, or with another
program first. Run to the end without stopping, the two are a forward and a backward like any other, to the bit.
"""

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from model.attention import Context
from model.batch import Batch, Denominators
from model.flow import begin, list_segments, share
from model.linear import Deferred
from model.mark import mark
from model.segment import Segment
from model.transformer import Transformer
from parallel.overlap.cut import Gradients, Stretch

T = TypeVar("T")
Program = Generator[None, None, T]
Tape = list[Stretch]


class Unrolled(NamedTuple):
    """What a forward leaves behind."""

    made: Any  # the carry of the last segment
    tape: Tape


def run(segments: Sequence[Segment], carry: Any, context: Context) -> Program[Unrolled]:
    """The forward of ``segments`` from ``carry``. Its history is on the tape: what it makes need not be kept."""
    anchor = torch.empty(0, requires_grad=True)
    tape = [Stretch()]
    carry = tape[0].enter(carry, anchor)
    for segment in segments:
        if segment.waits:
            tape[-1].leave(carry)
            yield
            tape.append(Stretch())
            carry = tape[-1].enter(carry, anchor)
        with mark(segment.name):
            carry = segment.module(carry, context)
    tape[-1].leave(carry)
    return Unrolled(carry, tape)


def unroll(
    model: Transformer, batch: Batch, denominators: Denominators, deferred: Deferred, x: Tensor | None
) -> Program[Unrolled]:
    """The forward of a stage, as ``Transformer.forward`` takes it; ``x`` wants its gradient. Makes ``Losses``."""
    return run(list_segments(model, batch, denominators), begin(model, x), share(model, batch, deferred))


def rewind(tape: Tape, gradients: Sequence[Tensor | None]) -> Program[Gradients]:
    """The backward: gradients of what the last segment made -> of what the first one got. Empties ``tape``."""
    back = list(gradients)
    while tape:
        back = tape.pop().backward(back)
        if tape:
            yield
    return back


def name(program: Program[T], called: object) -> Program[T]:
    """``program``, each of whose turns is a range ``called`` so in a profile."""
    while True:
        with mark(str(called)):
            try:
                next(program)
            except StopIteration as end:
                return end.value
        yield
