"""From a schedule to programs: what a rank computes, with what it sends and receives in between.

    rank 0   0F0 [0F0>1] 0F1 [0F1>1] [1B0<1] 0B0 0F2 [0F2>1 1B1<1] 0B1 [1B2<1] 0B2
    rank 1   [0F0<0] 1F0 [0F1<0] 1B0 [1B0>0] 1F1 1B1 [0F2<0 1B1>0] 1F2 1B2 [1B2>0]

    [...]    an exchange: transfers that start together        2F5>3   stage 2's output of micro-batch 5, to rank 3
                                                               2B5<3   the gradient of stage 2's input, from rank 3

Order. In the simulation at unit costs (``Cost()``) a tensor travels at the moment its action ends. Both ends put the
exchange of a moment behind what they have finished by then and before what they finish later. All programs follow one
clock, so they cannot deadlock even where a rank goes on from an exchange only when its peers have come to theirs: the
earliest exchange that is not done has all its peers waiting. What travels between two ranks is in one order on both
ends, and what crosses at a moment is one exchange.

A receive stands before the action during which its tensor arrives, not before the one that reads it, so a rank hides
transfers behind what it computes: it starts an exchange without waiting for it, waits for a tensor right before the
action that reads it, and for what it sends before it gives the memory away. Nothing travels within a rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import NamedTuple

import numpy as np

from parallel.pipeline.action import Compute, Schedule
from parallel.pipeline.simulate import Timeline, simulate
from parallel.pipeline.table import F, find_sources


class Kind(StrEnum):
    """The end of a transfer."""

    send = "send"
    receive = "receive"


class What(StrEnum):
    """What travels; forward between stages, or back."""

    activation = "activation"  # the output of a stage
    gradient = "gradient"  # the gradient of a stage's input


class Transfer(NamedTuple):
    """One end of one transfer; ``stage`` is the stage that made it, ``peer`` the pipeline rank at the other end."""

    kind: Kind
    what: What
    stage: int
    microbatch: int
    peer: int

    def __str__(self) -> str:
        tensor = f"{self.stage}{'F' if self.what is What.activation else 'B'}{self.microbatch}"
        return f"{tensor}{'>' if self.kind is Kind.send else '<'}{self.peer}"


class Exchange(NamedTuple):
    """Transfers of a rank that start together, in the order in which both ends have them."""

    transfers: tuple[Transfer, ...]

    def __str__(self) -> str:
        return f"[{' '.join(map(str, self.transfers))}]"


Step = Compute | Exchange
KINDS, WHATS = tuple(Kind), tuple(What)


@dataclass(frozen=True)
class Program:
    """The steps of each rank: the lists of ``schedule``, with exchanges in between."""

    schedule: Schedule
    lists: tuple[tuple[Step, ...], ...]


def lower(schedule: Schedule) -> Program:
    """The programs of a valid schedule; ValueError if its ranks wait in a circle."""
    timeline = simulate(schedule)
    behind: list[dict[int, list[Exchange]]] = [{} for _ in schedule.lists]
    for (rank, _, count), rows in groupby(_transfers(timeline), key=lambda row: row[:3]):
        transfers = (Transfer(KINDS[end], WHATS[what], *divmod(place, schedule.microbatches), peer)
                     for *_, what, place, end, peer in rows)  # fmt: skip
        behind[rank].setdefault(count, []).append(Exchange(tuple(transfers)))
    lists = []
    for computes, exchanges in zip(schedule.lists, behind, strict=True):
        steps: list[Step] = [*exchanges.get(0, ())]
        for count, compute in enumerate(computes, start=1):
            steps += [compute, *exchanges.get(count, ())]
        lists.append(tuple(steps))
    return Program(schedule, tuple(lists))


def _transfers(timeline: Timeline) -> Iterator[tuple[int, ...]]:
    """Both ends of all transfers in order: (rank, time, its computes that are over by then, what, place, end, peer)."""
    table, ends = timeline.table, timeline.ends
    ranks, sources = table.ranks().astype(np.int64), find_sources(table)
    columns = []
    for column in range(2):
        readers = np.flatnonzero(sources[:, column] < len(ends))
        makers = sources[readers, column]
        travels = ranks[makers] != ranks[readers]
        readers, makers = readers[travels], makers[travels]
        back = table.ops(column)[readers] != F
        place = table.places(column)[readers] + np.where(back, table.microbatches, -table.microbatches)
        columns.append((ranks[makers], ranks[readers], ends[makers], back, place))
    sender, receiver, time, what, place = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    rank, peer = np.concatenate([sender, receiver]), np.concatenate([receiver, sender])
    end = np.repeat([0, 1], len(sender))
    time, what, place = (np.tile(each, 2) for each in (time, what, place))
    span = int(timeline.makespan) + 1  # ranks one behind the other on a long clock
    over = np.searchsorted(ranks * span + ends, rank * span + time, side="right") - table.offsets[rank]
    order = np.lexsort((place, what, time, rank))
    return zip(*(each[order].tolist() for each in (rank, time, over, what, place, end, peer)), strict=True)
