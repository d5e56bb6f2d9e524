"""Weight gradients that the backwards of pairs have put off, to be computed while something is on its way.

    B0 - F0 - B1 - F1 - B2 - F2 | B0 - ..         a pair of one layer; - is a wait
       W    W    W    W           W

What the last stretch of a backward puts off is left to the first waits of the next pair, which have nothing else yet.
Oldest first: a parameter's gradients are added in the order of micro-batches.
"""

from collections import deque
from collections.abc import Callable

from model.linear import WeightGradient
from model.mark import mark
from model.segment import Wait

Compute = Callable[[WeightGradient], None]


class Backlog:
    """What waits to be computed."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._sources: deque[tuple[str, list[WeightGradient]]] = deque()

    def watch(self, label: str, source: list[WeightGradient]) -> None:
        """What is in ``source`` now, and what will be; a profile shows it under ``label``."""
        self._sources.append((label, source))

    def count(self) -> int:
        """How many there are."""
        return sum(len(source) for _, source in self._sources)

    def fill(self, place: int, wait: Wait) -> None:
        """Computes some, as the program in ``place`` comes to a wait: the backward (0) of a pair, or the forward (1).

        For counts one: they are soon there. Behind the backward half, so that the forward's wait, which comes before
        there are more, has as much to do.
        """
        there = self.count()
        self._take(min(there, 1) if wait is Wait.counts else there if place else -(-there // 2))

    def drain(self) -> None:
        """Computes all that is left."""
        self._take(self.count())
        self._sources.clear()

    def _take(self, count: int) -> None:
        while count:
            label, source = self._sources[0]
            if not source:
                self._sources.popleft()
                continue
            with mark(label):
                self._compute(source.pop(0))
            count -= 1
