"""A schedule as arrays, for what has to look at millions of actions: validation, simulation, pictures.

All lists lie one behind the other, rank after rank; ``offsets[rank]`` is where a rank's begins. A slot is one compute:
an action, or a pair. In ``codes`` its first column is the action, or the pair's forward; its second is the pair's
backward, or -1.

    code = (op * stages + stage) * microbatches + microbatch       op: 0 F, 1 B, 2 I, 3 W
    place = stage * microbatches + microbatch                      code % (stages * microbatches)

Eight million actions take 67 MB so, where Python's tuples take a gigabyte.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel.pipeline.action import Action, Compute, Op, Overlap, Schedule, parts

OPS = tuple(Op)
F, B, I, W = range(4)
INDEX = {op: number for number, op in enumerate(OPS)}


@dataclass(frozen=True, slots=True)
class Table:
    """Arrays of a schedule; N slots."""

    stages: int
    microbatches: int
    offsets: np.ndarray  # [ranks + 1], int64
    codes: np.ndarray  # [N, 2], int32 or int64

    def ops(self, column: int) -> np.ndarray:
        """The operation in a column of every slot, [N]: 0..3, or -1 where there is none."""
        return self.codes[:, column] // (self.stages * self.microbatches)

    def places(self, column: int) -> np.ndarray:
        """stage * microbatches + microbatch in a column of every slot, [N]; to be read where ``ops`` is not -1."""
        return self.codes[:, column] % (self.stages * self.microbatches)

    def ranks(self) -> np.ndarray:
        """The rank of every slot, [N]."""
        return np.repeat(np.arange(len(self.offsets) - 1, dtype=np.int32), np.diff(self.offsets))

    def rank_of(self, slot: int) -> int:
        """The rank whose list holds a slot."""
        return int(np.searchsorted(self.offsets, slot, side="right")) - 1

    def compute(self, slot: int) -> Compute:
        """What stands in a slot."""
        found = []
        for code in self.codes[slot].tolist():
            if code >= 0:
                op, place = divmod(code, self.stages * self.microbatches)
                found.append(Action(OPS[op], *divmod(place, self.microbatches)))
        return found[0] if len(found) == 1 else Overlap(*found)


def tabulate(schedule: Schedule) -> Table:
    """The table of a schedule. ValueError for a stage or a micro-batch that is none of the schedule's."""
    kind = np.int32 if 4 * schedule.stages * schedule.microbatches < 2**31 else np.int64
    offsets = np.cumsum([0, *map(len, schedule.lists)])
    codes = np.full((offsets[-1], 2), -1, dtype=kind)
    for rank, computes in enumerate(schedule.lists):
        into = codes[offsets[rank] : offsets[rank + 1]]
        pairs = [slot for slot, compute in enumerate(computes) if len(compute) == 2]
        firsts = [parts(compute)[0] for compute in computes] if pairs else computes
        try:
            into[:, 0] = _encode(firsts, schedule)  # type: ignore[arg-type]
            into[pairs, 1] = _encode([parts(computes[slot])[1] for slot in pairs], schedule)
        except IndexError:
            raise ValueError(_explain(rank, computes, schedule)) from None
    return Table(schedule.stages, schedule.microbatches, offsets, codes)


def count_live(table: Table) -> list[int]:
    """Per rank, the most activations alive at once, each of one stage and one micro-batch.

    An F makes one. A B releases it, and so does a W, but not an I. While a pair runs, both its sides are there.
    """
    first, second = table.ops(0), table.ops(1)
    made = (first == F).astype(np.int8)
    released = (first == B) | (first == W) | (second == B) | (second == W)
    change = made - released
    peaks = []
    for start, end in zip(table.offsets[:-1].tolist(), table.offsets[1:].tolist(), strict=True):
        before = np.cumsum(change[start:end], dtype=np.int64) - change[start:end]
        peaks.append(int((before + made[start:end]).max(initial=0)))
    return peaks


def find_sources(table: Table) -> np.ndarray:
    """The slots that each slot reads from, [N, 2], column by column as in ``codes``; N where it reads from none.

    F of a stage reads F of the stage before it; B and I read B or I of the stage after it or, in the last stage, its F;
    W reads I. ValueError if a slot reads what no list makes.
    """
    total, step, last = len(table.codes), table.microbatches, table.stages * table.microbatches
    forwards, backwards = (np.full(last, -1, dtype=np.int32) for _ in range(2))
    columns = [(table.ops(column), table.places(column)) for column in range(2)]
    for ops, places in columns:
        for at, chosen in ((forwards, ops == F), (backwards, (ops == B) | (ops == I))):
            slots = np.flatnonzero(chosen)
            at[places[slots]] = slots
    sources = np.full((total, 2), total, dtype=np.int32)
    for column, (ops, places) in enumerate(columns):
        into = sources[:, column]
        for op in (F, B, I, W):
            slots = np.flatnonzero(ops == op)
            place = places[slots]
            if op == F:
                slots, place = slots[place >= step], place[place >= step] - step
                into[slots] = forwards[place]
            elif op == W:
                into[slots] = backwards[place]
            else:
                inner = place < last - step
                into[slots[inner]] = backwards[place[inner] + step]
                into[slots[~inner]] = forwards[place[~inner]]
    missing = np.flatnonzero((sources < 0).any(axis=1))
    if len(missing):
        slot = int(missing[0])
        raise ValueError(f"{name_slot(table, slot)} needs what no rank computes")
    return sources


def name_slot(table: Table, slot: int) -> str:
    """``rank 3, action 7 "2F5":``, as every message about a schedule begins."""
    rank = table.rank_of(slot)
    return f'rank {rank}, action {slot - int(table.offsets[rank])} "{table.compute(slot)}":'


def _encode(actions: Sequence[Action], schedule: Schedule) -> np.ndarray:
    """Codes, [n]. IndexError if a stage or a micro-batch is out of range."""
    stages, microbatches = schedule.stages, schedule.microbatches
    rows = np.array([(INDEX[op], stage, microbatch) for op, stage, microbatch in actions], dtype=np.int64)
    op, stage, microbatch = rows.reshape(-1, 3).T
    if ((stage < 0) | (stage >= stages) | (microbatch < 0) | (microbatch >= microbatches)).any():
        raise IndexError
    return (op * stages + stage) * microbatches + microbatch


def _explain(rank: int, computes: Sequence[Compute], schedule: Schedule) -> str:
    """Which action of a list is out of range, and what the range is."""
    for slot, compute in enumerate(computes):
        for _, stage, microbatch in parts(compute):
            if not (0 <= stage < schedule.stages and 0 <= microbatch < schedule.microbatches):
                return (
                    f'rank {rank}, action {slot} "{compute}": there are stages 0 to {schedule.stages - 1} and '
                    f"micro-batches 0 to {schedule.microbatches - 1}"
                )
    raise AssertionError("a list that cannot be encoded has a stage or a micro-batch out of range")
