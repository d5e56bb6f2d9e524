"""When a bucket's gradients are complete: counted, because no gradient says that it is the last.

    gradients   ... | the stage's last backward, or what it had put off  g g g . g g . g g . | all is there
    buckets     ... | finishing                            0 starts ^   1 ^       2 ^        | finished: the others

A parameter may get several gradients in one backward: a tied embedding, experts in chunks. As many come between
``finishing`` and ``finished`` as did in the step before, provided that as many came ahead of ``finishing``: a step is a
pure function of its schedule. Where that does not hold, where there was no such step, and where a parameter has no
gradient at all, a bucket waits for ``finished``, and those behind it do: they start in their order, on every rank the
same, whatever a rank has counted. Counts only say when.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


class Countdown:
    """The buckets of a stage in the order in which they start, and what is missing in the first that has not."""

    def __init__(self, buckets: Sequence[Iterable[Hashable]]) -> None:
        """``buckets``: the members of each; a member is in one bucket at most."""
        self._bucket = {member: number for number, members in enumerate(buckets) for member in members}
        self._missing = [0] * len(buckets)
        self._then: Counter[Hashable] = Counter()  # what came in the last step's last backward,
        self._ahead_then = -1  # and how many before it; unlike any number until there was one
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._open, self._next = False, 0
        self._ahead: Counter[Hashable] = Counter()  # gradients before the last backward
        self._came: Counter[Hashable] = Counter()  # and in it
        self._expected: Counter[Hashable] | None = None

    def open(self) -> range:
        """The last backward begins. The buckets that may start at once: all that they wait for has come before."""
        self._open = True
        if self._ahead_then != self._ahead.total():
            return range(0)
        self._expected = self._then
        self._missing = [0] * len(self._missing)
        for member, number in self._bucket.items():
            self._missing[number] += not self._is_complete(member)
        return self._advance()

    def take(self, member: Hashable) -> range:
        """A gradient has been added up. The buckets that may start now."""
        if member not in self._bucket:
            return range(0)
        if not self._open:
            self._ahead[member] += 1
            return range(0)
        self._came[member] += 1
        if self._expected is None:
            return range(0)
        if self._came[member] > self._expected[member]:
            self._expected = None  # not the step that was learned from: nothing more is foreseen
            return range(0)
        self._missing[self._bucket[member]] -= self._is_complete(member)
        return self._advance()

    def close(self) -> None:
        """The last backward is over, and known from now on."""
        if not self._open:
            return
        alike = self._ahead_then == self._ahead.total()
        # The most that ever came, should it vary.
        self._then, self._ahead_then = self._came | self._then if alike else self._came, self._ahead.total()
        self._open, self._expected = False, None

    def _is_complete(self, member: Hashable) -> bool:
        assert self._expected is not None
        return self._came[member] >= self._expected[member] and self._ahead[member] + self._came[member] > 0

    def _advance(self) -> range:
        first = self._next
        while self._next < len(self._missing) and not self._missing[self._next]:
            self._next += 1
        return range(first, self._next)
