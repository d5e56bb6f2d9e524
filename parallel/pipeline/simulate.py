"""When every action of a schedule starts and ends, from the costs of its operations alone.

    start(a) = max(end(what its rank did before),  end(p) + send for each p on another rank that a reads from)
    end(a)   = start(a) + cost(a)

    F of stage s reads F of stage s-1;  B and I of stage s read B or I of stage s+1;  W reads I, on its own rank.

The model of a link: ``send`` is the time from the end of an action until what it made can be read on another rank. It
occupies neither of the two ranks, and messages do not wait for each other (no contention). On one rank nothing is sent.

Times are the longest paths of this graph. They are found in rounds: in each, every rank whose next action has all it
reads goes one action further, as one operation on arrays over ranks. Integer costs give integers, exactly; fractions
stay fractions.

Two kinds of bubble, per rank:

    makespan - busy      the whole step counts: the optimizer waits for the last rank (as a global norm makes it do)
    span - busy          from the rank's own first start to its own last end: what is left if steps could interlock

Memory: an F keeps the activations of one stage and micro-batch until its B or its W has run (an I alone releases
nothing); within an overlapped pair both sides are there. What is counted is activations of one stage and micro-batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from parallel.pipeline.action import Compute, Op, Overlap, Schedule, parts
from parallel.pipeline.table import I, Table, count_live, find_sources, tabulate
from parallel.pipeline.trace import Span
from parallel.pipeline.validate import advance

Number = int | float | Fraction
EXACT = 2**62  # integers up to here fit an array of machine integers, sums included


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """How long each operation of a stage takes, in any unit. Raises ValueError for costs that cannot be."""

    F: Number = 1  # forward
    B: Number = 2  # full backward
    I: Number = 1  # the part of it that gives the input's gradient
    W: Number = 1  # the part of it that gives the weights'
    FB: Number | None = None  # a forward and a full backward, overlapped; None: F + B. With I in place of B: FB - B + I
    send: Number = 0  # from the end of an action until another rank can read what it made

    def __post_init__(self) -> None:
        for name in ("F", "B", "I", "W"):
            if not getattr(self, name) > 0:
                raise ValueError(f"cost.{name}={getattr(self, name)} must be positive")
        if not self.send >= 0:
            raise ValueError(f"cost.send={self.send} must not be negative")
        if not self.pair >= max(self.F, self.B):
            raise ValueError(
                f"cost.FB={self.FB} must be at least cost.F={self.F} and cost.B={self.B}: a pair ends with its longer "
                "side"
            )

    @property
    def pair(self) -> Number:
        """What a forward and a full backward take that are overlapped."""
        return self.F + self.B if self.FB is None else self.FB

    def table(self, total: int) -> np.ndarray:
        """What a slot costs, [6]: F, B, I, W, a pair with B, a pair with I; in a type that holds ``total`` of them."""
        costs = [self.F, self.B, self.I, self.W, self.pair, self.pair - self.B + self.I]
        if any(isinstance(cost, Fraction) for cost in (*costs, self.send)):
            return np.array(costs, dtype=object)
        if all(isinstance(cost, int) for cost in (*costs, self.send)):
            exact = (max(costs) + self.send) * (total + 1) < EXACT
            return np.array(costs, dtype=np.int64 if exact else object)
        return np.array(costs, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step: when each slot of the schedule's table starts and ends. The unit is that of the costs."""

    schedule: Schedule
    cost: Cost
    table: Table
    starts: np.ndarray  # [N]
    ends: np.ndarray  # [N]
    busy: tuple[Number, ...]  # per rank, the sum of its costs
    spans: tuple[Number, ...]  # per rank, from its first start to its last end
    peaks: tuple[int, ...]  # per rank, the most activations alive at once, of one stage and micro-batch each

    @property
    def makespan(self) -> Number:
        """From the start of the step to the last end of all."""
        return _plain(self.ends, int(self.ends.argmax())) if len(self.ends) else 0

    @property
    def bubbles(self) -> tuple[Number, ...]:
        """Per rank, the time of the whole step in which it computes nothing: the loss where ranks step together."""
        makespan = self.makespan
        return tuple(makespan - busy for busy in self.busy)

    @property
    def gaps(self) -> tuple[Number, ...]:
        """Per rank, the time between its own first start and last end in which it computes nothing."""
        return tuple(span - busy for span, busy in zip(self.spans, self.busy, strict=True))

    def rows(self, ranks: Iterable[int], second: float = 1) -> Iterator[Span]:
        """What ``ranks`` do and when, a unit of cost being ``second`` seconds."""
        for rank in ranks:
            first = int(self.table.offsets[rank])
            for slot, compute in enumerate(self.schedule.lists[rank], start=first):
                yield Span(rank, compute, float(self.starts[slot]) * second, float(self.ends[slot]) * second)


def simulate(schedule: Schedule, cost: Cost | None = None, durations: Sequence[float] | None = None) -> Timeline:
    """The timeline of a valid ``schedule``. ValueError if ranks wait in a circle, or for what nobody computes.

    ``durations``: of every action and pair, rank after rank, as a run measured them or ``stretch`` gives them;
    ``cost.send`` still counts.
    """
    cost = cost or Cost()
    table = tabulate(schedule)
    kinds: np.ndarray = np.where(table.codes[:, 1] < 0, table.ops(0), 4 + (table.ops(1) == I)).astype(np.int8)
    costs = cost.table(len(kinds))
    if durations is not None:  # every slot is a kind of its own
        kinds, costs = np.arange(len(kinds), dtype=np.int32), np.array(durations, dtype=np.float64)
    starts, ends = _run(table, kinds, costs, cost.send)
    busy, spans = [], []
    for first, end in zip(table.offsets[:-1].tolist(), table.offsets[1:].tolist(), strict=True):
        counts = np.bincount(kinds[first:end], minlength=len(costs))
        busy.append(sum(count * each for count, each in zip(counts.tolist(), costs.tolist(), strict=True)))
        spans.append(_plain(ends, end - 1) - _plain(starts, first) if end > first else 0)
    return Timeline(schedule, cost, table, starts, ends, tuple(busy), tuple(spans), tuple(count_live(table)))


def stretch(schedule: Schedule, cost: Cost, weights: Sequence[float]) -> list[float]:
    """The durations of actions and pairs where an action of stage s takes ``weights[s]`` times its cost.

    A pair takes its cost times the mean of its sides' weights, each side counting as much as it costs alone.
    """
    alone = {op: float(getattr(cost, op)) for op in Op}

    def last(compute: Compute) -> float:
        sides = [(alone[action.op], weights[action.stage]) for action in parts(compute)]
        together = sum(each for each, _ in sides)
        if isinstance(compute, Overlap):
            together = float(cost.pair) - alone[Op.B] + alone[compute.backward.op]
        return together * sum(each * weight for each, weight in sides) / sum(each for each, _ in sides)

    return [last(compute) for computes in schedule.lists for compute in computes]


def _run(table: Table, kinds: np.ndarray, costs: np.ndarray, send: Number) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of every slot, [N] each. There are as many rounds as the longest chain has slots."""
    total, sources, owner = len(kinds), find_sources(table), np.append(table.ranks(), -1)
    # Slot N stands for "reads from none": it ends at 0, on no rank.
    starts, ends = np.zeros(total, dtype=costs.dtype), np.zeros(total + 1, dtype=costs.dtype)
    clock = np.zeros(len(table.offsets) - 1, dtype=costs.dtype)
    for ranks, slots in advance(table, sources):
        read = sources[slots]
        arrived = ends[read]
        if send:
            arrived = arrived + send * ((owner[read] != ranks[:, None]) & (read < total))
        starts[slots] = np.maximum(clock[ranks], arrived.max(axis=1))
        clock[ranks] = ends[slots] = starts[slots] + costs[kinds[slots]]
    return starts, ends[:-1]


def _plain(times: np.ndarray, slot: int) -> Number:
    """One time as Python's own number."""
    value = times[slot]
    return value.item() if isinstance(value, np.generic) else value
