"""When a bucket's gradients are complete: counted, because no gradient says that it is the last.

    gradients   ... | the stage's last backward, or what it had put off  g g g . g g . g g . | all is there
    buckets     ... | finishing                            0 starts ^   1 ^       2 ^        | finished: the others

What has been put off is a list: each gradient in it comes, and no other. A whole backward says nothing beforehand, and
a parameter may get several gradients in it: a tied embedding, experts in chunks. There as many come as in the step
before, and at least one to each parameter that had one earlier in the step, provided that all had as many ahead of
``finishing`` as in the step before: what a step computes is a pure function of its schedule.

Where that does not hold, where there was no such step, and where a parameter has no gradient at all, a bucket waits for
``finished``, and those behind it do: they start in their order, on every rank the same, whatever a rank has counted.
Counts only say when. Should they be wrong all the same, a gradient comes for a bucket that has started, and the slab
raises an error.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence


class Countdown:
    """The buckets of a stage in the order in which they start, and what is missing in the first that has not."""

    def __init__(self, buckets: Sequence[Iterable[Hashable]]) -> None:
        """``buckets``: the members of each; a member is in one bucket at most."""
        self._bucket = {member: number for number, members in enumerate(buckets) for member in members}
        self._missing = [0] * len(buckets)
        self._ahead_then: Counter[Hashable] | None = None  # of the last step; None: there was none
        self._then: Counter[Hashable] = Counter()
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self._open, self._learns, self._next = False, False, 0
        self._ahead: Counter[Hashable] = Counter()  # gradients before the last backward
        self._came: Counter[Hashable] = Counter()  # and in it
        self._expected: Counter[Hashable] | None = None

    def open(self, coming: Iterable[Hashable] | None = None) -> range:
        """The last backward begins, or what it has put off: gradients of ``coming``, as often as they are listed.

        Returns the buckets that may start at once: all that they wait for has come before.
        """
        self._open, self._learns = True, coming is None
        if coming is not None:
            self._expected = Counter(member for member in coming if member in self._bucket)
        elif self._ahead == self._ahead_then:
            self._expected = self._then | Counter(self._ahead.keys())
        else:
            return range(0)
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
        if self._learns:
            # The most that ever came, should it vary.
            self._then = self._came | self._then if self._ahead == self._ahead_then else self._came
            self._ahead_then = self._ahead
        self._open, self._expected, self._learns = False, None, False

    def _is_complete(self, member: Hashable) -> bool:
        assert self._expected is not None
        return self._came[member] >= self._expected[member] and self._ahead[member] + self._came[member] > 0

    def _advance(self) -> range:
        first = self._next
        while self._next < len(self._missing) and not self._missing[self._next]:
            self._next += 1
        return range(first, self._next)
