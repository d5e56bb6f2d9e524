"""Weight gradients that backwards have put off, to be computed before something is waited for that is on its way.

    B0 - F0 - B1 - F1 - B2 - F2 | B0 - ..         a pair of one layer; - is a wait
              W    W    W    W         W

Half of what there is at each wait: the next one, which comes before there are more, has about as much to do. What the
last stretch of a backward puts off is left to whatever comes next. Oldest first: a parameter's gradients are added in
the order of micro-batches.
"""

from collections import deque
from collections.abc import Callable

from model.linear import WeightGradient
from model.mark import mark

Compute = Callable[[WeightGradient], None]


class Backlog:
    """What waits to be computed."""

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._sources: deque[tuple[str, list[WeightGradient]]] = deque()

    def watch(self, label: str, source: list[WeightGradient]) -> None:
        """What is in ``source`` now, and what will be; a profile shows it under ``label``.

        What is older than the source before is computed first: where nothing is ever waited for, no more piles up.
        """
        while len(self._sources) > 1:
            self._take(len(self._sources[0][1]))
            self._sources.popleft()
        self._sources.append((label, source))

    def count(self) -> int:
        """How many there are."""
        return sum(len(source) for _, source in self._sources)

    def idle(self, most: int | None = None) -> None:
        """Half of them, or at most so many: see ``parallel.overlap.lanes.Lanes``."""
        half = -(-self.count() // 2)
        self._take(half if most is None else min(most, half))

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
            taken = min(count, len(source))
            with mark(label):
                for _ in range(taken):
                    self._compute(source.pop(0))
            count -= taken
