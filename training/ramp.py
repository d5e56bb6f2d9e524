"""How many sequences each step trains on, where they start, and how they are cut into micro-batches.

The batch grows with the tokens seen, in jumps of ``run.ramp.jump`` sequences, from ``run.ramp.start`` to
``run.global_batch``; without a ramp it is ``run.global_batch`` throughout.

    batch ^            ________________   global_batch
          |        ___|
          |    ___|
          |___|                           start
          +-----------+---------------->  tokens seen
                 ramp.tokens

Step k trains on the sequences before(k) .. before(k + 1) of the endless shuffled order: the data cursor is
the prefix sum of the batches, whatever number of processes shares them. (DeepSeek-V3, section 4.2, goes
from 3072 to 15360 sequences over 469 B tokens.)
"""

from bisect import bisect_right
from dataclasses import dataclass
from typing import NamedTuple

from training.config import RunSection


class Level(NamedTuple):
    """A stretch of steps of one batch size."""

    step: int  # the first
    before: int  # sequences seen when it starts
    batch: int  # sequences a step


@dataclass(frozen=True, slots=True)
class BatchSchedule:
    """Batch sizes as a pure function of the step."""

    levels: tuple[Level, ...]

    def size(self, step: int) -> int:
        """Sequences in the global batch of ``step``."""
        return self._level(step).batch

    def before(self, step: int) -> int:
        """The data cursor: sequences seen when ``step`` starts."""
        level = self._level(step)
        return level.before + (step - level.step) * level.batch

    def plan(self, step: int, micro_batch: int, replicas: int = 1, replica: int = 0) -> list[tuple[int, int]]:
        """The micro-batches of ``step`` for one of ``replicas``: each its first sequence's position, and its size.

        Together the replicas' micro-batches of one number are a stretch of the order, in the order of the replicas.
        ``replicas`` divides the batch, so all have equally many, of equal sizes.
        """
        first, stop = self.before(step), self.before(step + 1)
        plan = []
        for at in range(first, stop, micro_batch * replicas):
            count = min(micro_batch, (stop - at) // replicas)
            plan.append((at + replica * count, count))
        return plan

    def resume(self, step: int, sequences: int) -> "BatchSchedule":
        """The same ramp for a run that has seen so many ``sequences`` when it takes ``step``, however it came there."""
        if self.before(step) == sequences:
            return self
        now = bisect_right(self.levels, sequences, key=lambda level: level.before) - 1
        levels = [Level(step, sequences, self.levels[now].batch)]
        for later in self.levels[now + 1 :]:
            first, before, size = levels[-1]
            steps = -(-(later.before - before) // size)
            levels.append(Level(first + steps, before + steps * size, later.batch))
        return BatchSchedule(tuple(levels))

    def _level(self, step: int) -> Level:
        return self.levels[bisect_right(self.levels, step, key=lambda level: level.step) - 1]


def count_microbatches(batch: int, micro_batch: int, replicas: int) -> int:
    """Micro-batches that each of ``replicas`` has of a global batch, the last of them perhaps smaller."""
    return -(-batch // (micro_batch * replicas))


def batch_sizes(run: RunSection) -> range:
    """The sizes that the global batch takes in a run, ascending, in sequences; the last is ``run.global_batch``."""
    start = run.global_batch if run.ramp.start is None else run.ramp.start
    return range(start, run.global_batch + 1, run.ramp.jump or start)


def schedule_batches(run: RunSection, sequence_length: int) -> BatchSchedule:
    """The schedule that ``run.global_batch`` and ``run.ramp`` describe; ``sequence_length`` in tokens."""
    sizes = batch_sizes(run)
    start, full = sizes[0], sizes[-1]
    levels = [Level(0, 0, start)]
    for batch in sizes[1:]:
        step, before, size = levels[-1]
        # The line from start to full passes `batch` after tokens * (batch - start) / (full - start) tokens;
        # the first step to begin there or later has it. In whole numbers, so that no rounding moves a
        # boundary.
        scale = sequence_length * (full - start)
        steps = max(0, -(-(run.ramp.tokens * (batch - start) - before * scale) // (size * scale)))
        levels.append(Level(step + steps, before + steps * size, batch))
    return BatchSchedule(tuple(levels))
