"""What a schedule must hold before a process runs it. Every refusal names rank, action and reason.

    once        each stage of each micro-batch has one F, and one B or one I and one W; or there are forwards only
    place       they are on one rank, which keeps the activations; ranks that share a stage share all their stages
    order       F before its backward, I before its W; weight gradients of a stage ascend in micro-batch order, so that
                sums have the same bits in every schedule
    progress    ranks never wait in a circle: an F waits for the stage before it, a B or an I for the stage after it
    memory      the most activations alive at once on each rank, which is what ``validate`` returns

Everything is linear in the number of actions, as operations on the arrays of ``table``; an event is an action in the
order of the lists, a pair being two: its forward, then its backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parallel.pipeline.action import Action, Schedule
from parallel.pipeline.table import OPS, B, F, I, Table, W, count_live, find_sources, name_slot, tabulate


def validate(schedule: Schedule) -> tuple[int, ...]:
    """The peak of live activations per rank, each of one stage and one micro-batch; ValueError for a bad schedule."""
    if len(schedule.lists) != schedule.ranks or min(schedule.ranks, schedule.stages, schedule.microbatches) < 1:
        raise ValueError(
            f"{schedule.name} has {len(schedule.lists)} lists for {schedule.ranks} ranks, {schedule.stages} stages and "
            f"{schedule.microbatches} micro-batches: one list a rank, and at least one of each"
        )
    table = tabulate(schedule)
    events = _spread(table)
    _check_pairs(events)
    at = _check_once(events)
    if (at[B:] >= 0).any():
        _check_busy(events)
        _check_backwards(events, at)
        _check_ranks_and_order(events, at)
        _check_ascending(events)
    _check_copies(events)
    for _ in advance(table, find_sources(table)):
        pass
    return tuple(count_live(table))


def advance(table: Table, sources: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All slots in an order in which they can run, in rounds of (ranks, their slots): each rank that can goes one on.

    ``sources`` are those of ``find_sources``. ValueError if ranks wait in a circle.
    """
    done = np.zeros(len(table.codes) + 1, dtype=bool)
    done[-1] = True  # stands for "reads from none"
    head, limit = table.offsets[:-1].copy(), table.offsets[1:]
    waiting = np.flatnonzero(head < limit)
    while len(waiting):
        slots = head[waiting]
        ready = done[sources[slots]].all(axis=1)
        if not ready.any():
            raise ValueError(_explain_circle(table, sources, done, head))
        ranks, slots = waiting[ready], slots[ready]
        yield ranks, slots
        done[slots] = True
        head[ranks] += 1
        waiting = waiting[head[waiting] < limit[waiting]]


@dataclass(frozen=True, slots=True)
class _Events:
    """The actions of a table, pairs spread out; E of them, in the order of the lists."""

    table: Table
    slots: np.ndarray  # [E]
    ranks: np.ndarray  # [E]
    ops: np.ndarray  # [E]
    places: np.ndarray  # [E], stage * microbatches + microbatch

    def name(self, event: int) -> str:
        """How a message about an action begins."""
        return name_slot(self.table, int(self.slots[event]))

    def where(self, event: int) -> str:
        """Rank and action, for a message about another action."""
        slot, rank = int(self.slots[event]), int(self.ranks[event])
        return f"rank {rank}, action {slot - int(self.table.offsets[rank])}"

    def action(self, op: int, place: int) -> Action:
        """An action that may be in no list."""
        return Action(OPS[op], *divmod(int(place), self.table.microbatches))


def _spread(table: Table) -> _Events:
    flat = table.codes.ravel()
    chosen = np.flatnonzero(flat >= 0)
    ops, places = np.divmod(flat[chosen], table.stages * table.microbatches)
    slots = chosen // 2
    return _Events(table, slots, table.ranks()[slots], ops, places)


def _check_pairs(events: _Events) -> None:
    """A pair is a forward and the B or I of another micro-batch, which do not need each other."""
    table = events.table
    pairs = np.flatnonzero(table.codes[:, 1] >= 0)
    first, second = table.codes[pairs].T
    total = table.stages * table.microbatches
    wrong = (first // total != F) | ~np.isin(second // total, (B, I))
    if wrong.any():
        slot = int(pairs[wrong][0])
        raise ValueError(f"{name_slot(table, slot)} a pair is a forward and a backward (B or I), in this order")
    same = first % table.microbatches == second % table.microbatches
    if same.any():
        slot = int(pairs[same][0])
        raise ValueError(f"{name_slot(table, slot)} a pair is of two micro-batches: of one, they wait for each other")


def _check_once(events: _Events) -> np.ndarray:
    """Each action at most once, each forward once: where they are, [4, stages * microbatches], -1 for nowhere."""
    table = events.table
    total = table.stages * table.microbatches
    forwards = np.unique(events.places[events.ops == F])
    if len(forwards) < total:  # the first number that is missing; before arrays of this size are made
        gaps = np.flatnonzero(forwards != np.arange(len(forwards)))
        raise ValueError(_explain_missing(events, int(gaps[0]) if len(gaps) else len(forwards)))
    codes = events.ops * total + events.places
    at = np.full(4 * total, -1, dtype=np.int64)
    at[codes] = np.arange(len(codes))
    again = np.flatnonzero(at[codes] != np.arange(len(codes)))
    if len(again):
        first = int(again[0])
        second = int(np.flatnonzero(codes == codes[first])[1])
        raise ValueError(f"{events.name(second)} is computed by {events.where(first)} already")
    return at.reshape(4, total)


def _explain_missing(events: _Events, place: int) -> str:
    """The missing forward, named at the action that is closest to it."""
    stage, microbatch = divmod(place, events.table.microbatches)
    stages, microbatches = np.divmod(events.places, events.table.microbatches)
    distance = abs(stages - stage) + events.table.stages * abs(microbatches - microbatch)
    if not len(distance):
        return f"rank 0, action 0: {events.action(F, place)} is computed by no rank, nor is anything else"
    return f"{events.name(int(distance.argmin()))} {events.action(F, place)} is computed by no rank"


def _check_busy(events: _Events) -> None:
    idle = np.flatnonzero(np.diff(events.table.offsets) == 0)
    if len(idle):
        raise ValueError(f"rank {idle[0]}, action 0: there is none; a rank without a stage has no place in a pipeline")


def _check_backwards(events: _Events, at: np.ndarray) -> None:
    """Each forward has a B, or an I and a W."""
    full, inputs, weights = (at[op] >= 0 for op in (B, I, W))
    rules = (
        (full & inputs, I, B, "is a part of {}, which is computed too"),
        (full & weights, W, B, "is a part of {}, which is computed too"),
        (inputs & ~weights, I, W, "lacks its weight gradient: {} is computed by no rank"),
        (weights & ~inputs & ~full, W, I, "lacks its input gradient: {} is computed by no rank"),
        (~full & ~inputs, F, B, "lacks its backward: {} is computed by no rank"),
    )
    for wrong, op, other, reason in rules:
        places = np.flatnonzero(wrong)
        if len(places):
            place = int(places[0])
            raise ValueError(f"{events.name(at[op, place])} {reason.format(events.action(other, place))}")


def _check_ranks_and_order(events: _Events, at: np.ndarray) -> None:
    """A backward follows its forward on the same rank, a weight gradient its input gradient."""
    back = np.maximum(at[B], at[I])  # one of them is -1
    split = np.flatnonzero(at[W] >= 0)
    for before, after in ((at[F], back), (at[I][split], at[W][split])):
        for wrong, reason in (
            (events.ranks[before] != events.ranks[after], "needs what {} keeps, on another rank"),
            (before > after, "needs {}, which comes later"),
        ):
            found = np.flatnonzero(wrong)
            if len(found):
                needed, event = int(before[found[0]]), int(after[found[0]])
                action = events.action(events.ops[needed], events.places[needed])
                where = f"{action} ({events.where(needed)})"
                raise ValueError(f"{events.name(event)} {reason.format(where)}")


def _check_ascending(events: _Events) -> None:
    """On each rank, the weight gradients of a stage come in the order of their micro-batches."""
    weights = np.flatnonzero((events.ops == B) | (events.ops == W))
    stage, microbatch = np.divmod(events.places[weights], events.table.microbatches)
    group = events.ranks[weights].astype(np.int64) * events.table.stages + stage
    order = np.argsort(group, kind="stable")
    group, microbatch = group[order], microbatch[order]
    wrong = np.flatnonzero((group[1:] == group[:-1]) & (microbatch[1:] < microbatch[:-1]))
    if len(wrong):
        before, event = (int(weights[order[wrong[0] + offset]]) for offset in (0, 1))
        raise ValueError(
            f"{events.name(event)} weight gradients of a stage ascend in micro-batch order, and "
            f"{events.action(events.ops[before], events.places[before])} ({events.where(before)}) comes before it"
        )


def _check_copies(events: _Events) -> None:
    """Ranks that hold copies of one stage hold copies of the same stages: they sum the same gradients."""
    table = events.table
    holds = np.zeros((len(table.offsets) - 1, table.stages), dtype=bool)
    holds[events.ranks, events.places // table.microbatches] = True
    ranks, stages = np.nonzero(holds)
    kinds: dict[bytes, int] = {}
    kind = np.array([kinds.setdefault(row.tobytes(), len(kinds)) for row in holds])
    first = holds.argmax(axis=0)[stages]
    wrong = np.flatnonzero(kind[ranks] != kind[first])
    if len(wrong):
        rank, stage, other = int(ranks[wrong[0]]), int(stages[wrong[0]]), int(first[wrong[0]])
        event = int(np.flatnonzero((events.ranks == rank) & (events.places // table.microbatches == stage))[0])
        raise ValueError(
            f"{events.name(event)} ranks {other} and {rank} both compute stage {stage}, but not the same stages: "
            f"{_listed(holds[other])} and {_listed(holds[rank])}"
        )


def _listed(row: np.ndarray) -> str:
    found = np.flatnonzero(row).tolist()
    return ", ".join(map(str, found[:8])) + (" and more" if len(found) > 8 else "")


def _explain_circle(table: Table, sources: np.ndarray, done: np.ndarray, head: np.ndarray) -> str:
    """A circle of ranks, from the one whose action comes first in its list."""
    heads = head.tolist()
    wait, seen = next(slot for rank, slot in enumerate(heads) if slot < table.offsets[rank + 1]), list[int]()
    while wait not in seen:
        seen.append(wait)
        source = next(int(source) for source in sources[wait] if not done[source])
        wait = heads[table.rank_of(source)]
    circle = seen[seen.index(wait) :]
    others = ", ".join(f'"{table.compute(slot)}" of rank {table.rank_of(slot)}' for slot in circle[1:9])
    return f"{name_slot(table, circle[0])} waits in a circle with {others or 'what comes after it in its own list'}"
