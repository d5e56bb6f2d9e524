"""A segment: one step of what is done to a micro-batch, and what it occupies and waits for meanwhile.

carry --module--> carry --module--> carry            a runner may do something else wherever the next one waits
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from model.attention import Context
from model.mark import mark


class Lane(StrEnum):
    """What a segment occupies: the processor or the network."""

    compute = "compute"
    comm = "comm"


class Segment(NamedTuple):
    """One step of a block: ``module(carry, context)`` gives the next carry."""

    name: str
    lane: Lane
    module: Callable[[Any, Context], Any]
    waits: bool = False  # begins with a wait for rows; counts, which are soon there, are not worth a turn


def run(segments: Sequence[Segment], carry: Any, context: Context) -> Any:
    """One segment after the other; gives what the last one made."""
    for segment in segments:
        with mark(segment.name):
            carry = segment.module(carry, context)
    return carry
