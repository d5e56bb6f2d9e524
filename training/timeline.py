"""What torch's profiler has seen of a rank, as rows that a person can read: what is computed while what travels.

    actions     | 1F0&0B2                                                         |    marks of the interpreter
    compute     | experts B2 | attention F0 .. | W2 | experts B2 | ..                  segments, by micro-batch
    network     |     layers.3.combine B2 ...... | layers.2.dispatch F0 .......... |   from launch to landing
                |       gloo:all_to_all ......       gloo:all_to_all ......            and when it really travelled
    memory      what is allocated beyond what was when the profile began, MiB

Forwards are marked segment by segment (``model.mark``). Of a backward the profiler has autograd's nodes, each with the
sequence number of the operation that made it in the forward: that says which segment it belongs to. What has no such
number, such as a sum into a gradient, belongs where the node before it did.

The profiler's times are microseconds from ``baseTimeNanoseconds``, both by the clock of the machine: ranks of a machine
need no alignment. In the rows, times are microseconds too, from ``origin``. Standard library only.
"""

import re
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

STEP, ACTION, PAIR = r"step \d+", r"(\d+)([FBIW])(\d+)", r"\d+[FBIW]\d+&\d+[FBIW]\d+"
FLIGHT, SEGMENT, TRANSFER = r"(leave|land) (\d+)", r"[a-z_][a-z_.\d]*", r"(gloo|nccl|xccl):\w+"
NODE = "autograd::engine::evaluate_function: "
ROWS = ("simulated", "actions", "compute", "network")  # threads of the trace, the last in as many as it takes
PAUSE = 20.0  # microseconds between two samples of the memory

Raw = dict[str, Any]  # of torch's profiler


class Range(NamedTuple):
    """Something that took time."""

    name: str
    start: float  # microseconds
    end: float

    def holds(self, time: float) -> bool:
        """Whether it was going on at ``time``."""
        return self.start <= time <= self.end


class Piece(NamedTuple):
    """A part of the work of an action."""

    name: str  # the segment, or "update", "weights", ..
    action: str  # "1F0": stage, op, micro-batch; "" outside of actions
    start: float
    end: float

    def holds(self, time: float) -> bool:
        """Whether it was going on at ``time``."""
        return self.start <= time <= self.end


class Transfer(NamedTuple):
    """A collective or a message, with the times that are known of it."""

    name: str  # the backend's: gloo:all_to_all
    piece: Piece | None  # what started it
    start: float  # launched, or begun where the launch is not known
    end: float  # landed: somebody has waited for it; or over
    travelled: tuple[float, float] | None  # when it was really on its way


class Seen(NamedTuple):
    """All that there is to say about a rank."""

    steps: list[Range]
    actions: list[Range]
    pieces: list[Piece]
    waits: list[Range]  # for what was not there yet
    transfers: list[Transfer]
    memory: list[tuple[float, float]]  # when, bytes


class Marks:
    """Ranges that do not overlap, to be asked which of them a time lies in."""

    def __init__(self, ranges: Iterable[Any]) -> None:
        self.ranges = sorted(ranges, key=lambda each: each.start)
        self._starts = [each.start for each in self.ranges]

    def find(self, time: float) -> Any:
        """The range at ``time``, or None."""
        place = bisect_right(self._starts, time) - 1
        return self.ranges[place] if place >= 0 and self.ranges[place].holds(time) else None


def look(trace: Raw, origin: int) -> Seen:
    """``trace``: what ``torch.profiler`` exports; ``origin``: nanoseconds since 1970 that times are counted from."""
    shift = (trace.get("baseTimeNanoseconds", 0) - origin) / 1000
    events = [event | {"ts": event["ts"] + shift} for event in trace["traceEvents"] if event["ph"] in "Xi"]
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
    marked = [event for event in events if event.get("cat") == "user_annotation"]
    steps, turns, pairs = (list(_ranges(marked, pattern)) for pattern in (STEP, ACTION, PAIR))
    actions = Marks(_innermost(turns))
    forward = [
        Piece(each.name, _name(actions.find(each.start)), each.start, each.end)
        for each in _qualify(list(_ranges(marked, SEGMENT)))
    ]
    pieces = [*forward, *_find_backward(events, Marks(forward), actions)]
    pieces += [Piece("weights", each.name, each.start, each.end) for each in actions.ranges if "W" in each.name]
    pieces.sort(key=lambda piece: piece.start)
    waits = [each for each in _ranges(marked, FLIGHT) if each.name.startswith("land")]
    outer = _outermost([*pairs, *turns])
    return Seen(steps, outer, pieces, waits,
                find_transfers(events, Marks(pieces)), _find_memory(events))  # fmt: skip


def find_transfers(events: Sequence[Raw], pieces: Marks) -> list[Transfer]:
    """Collectives and messages of a rank, whose ``events`` are in the order of time."""
    launches: defaultdict[str, deque[float]] = defaultdict(deque)
    marked = [event for event in events if event.get("cat") == "user_annotation"]
    flights = list(_fly(_ranges(marked, FLIGHT)))
    parts: defaultdict[tuple[Range, Range], list[tuple[str, float, float]]] = defaultdict(list)
    found: list[Transfer] = []
    for event in events:
        if event["name"].startswith("c10d::"):
            launches[_kind(event["name"])].append(event["ts"])
        elif re.fullmatch(TRANSFER, event["name"]) and event.get("cat") == "user_annotation":
            # A kind's works begin in the order in which they were launched.
            start, end, waiting = event["ts"], event["ts"] + event["dur"], launches[_kind(event["name"])]
            launched = waiting.popleft() if waiting else start
            flight = next((flight for flight in flights if flight[0].holds(launched)), None)
            if flight is not None:  # which may be several messages
                parts[flight].append((event["name"], start, end))
            else:
                found.append(Transfer(event["name"], pieces.find(launched), launched, end, (start, end)))
    for leave, land in flights:
        # On a GPU, where things travel by kernels, the profiler does not see them here.
        names, starts, ends = zip(*parts[leave, land], strict=True) if parts[leave, land] else (["flight"], [], [])
        travelled = (min(starts), min(max(ends), land.end)) if starts else None
        found.append(Transfer(names[0], pieces.find(leave.start), leave.start, land.end, travelled))
    return sorted(found, key=lambda each: each.start)


def list_events(rank: int, seen: Seen) -> Iterator[Raw]:
    """The rows of a rank as events of a Chrome trace; ``rank`` is the process."""
    yield _call("process_name", rank, 0, f"rank {rank}")
    yield {"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}}
    for each in (*seen.steps, *seen.actions):
        yield _complete(rank, 1, each.name, "step" if each in seen.steps else "action", each.start, each.end)
    for piece in seen.pieces:
        yield _complete(rank, 2, *describe(piece), piece.start, piece.end) | {"args": explain(piece)}
    for wait in seen.waits:
        yield _complete(rank, 2, "waits", "wait", wait.start, wait.end)
    rows = 0
    for row, transfer in _place(seen.transfers):
        rows = max(rows, row + 1)
        if transfer.piece is not None:
            about = {"args": explain(transfer.piece)}
            yield _complete(rank, 3 + row, *describe(transfer.piece), transfer.start, transfer.end) | about
        if transfer.travelled is not None:
            yield _complete(rank, 3 + row, transfer.name, "travels", *transfer.travelled)
    for tid, name in enumerate((*ROWS[:3], *(f"network {row + 1}" for row in range(rows)))):
        yield _call("thread_name", rank, tid, name)
        yield {"ph": "M", "name": "thread_sort_index", "pid": rank, "tid": tid, "args": {"sort_index": tid}}
    for time, value in thin(seen.memory):
        yield {"ph": "C", "name": "memory", "pid": rank, "tid": 0, "ts": time, "args": {"MiB": value / 2**20}}


def find_peak(seen: Seen, step: Range) -> tuple[float, Piece | None] | None:
    """The most bytes during ``step``, and what was going on; None without a record."""
    samples = [(value, time) for time, value in seen.memory if step.holds(time)]
    if not samples:
        return None
    value, time = max(samples)
    return value, Marks(seen.pieces).find(time)


def describe(piece: Piece) -> tuple[str, str]:
    """A piece's name with its op and micro-batch, and its category."""
    if not piece.action:
        return piece.name, "other"
    _, op, microbatch = _split(piece.action)
    return f"{piece.name} {op}{microbatch}", {"F": "forward", "W": "weights"}.get(op, "backward")


def explain(piece: Piece) -> Raw:
    """What belongs to a piece besides."""
    if not piece.action:
        return {}
    stage, op, microbatch = _split(piece.action)
    return {"segment": piece.name, "op": op, "stage": int(stage), "micro-batch": int(microbatch)}


def thin(samples: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """The largest sample of every ``PAUSE``."""
    held: tuple[float, float] | None = None
    for time, value in samples:
        if held is not None and time - held[0] < PAUSE:
            held = held[0], max(held[1], value)
            continue
        if held is not None:
            yield held
        held = time, value
    if held is not None:
        yield held


def _find_backward(events: Sequence[Raw], forward: Marks, actions: Marks) -> Iterator[Piece]:
    """Autograd's nodes, one after the other, joined to the segments whose forward made them."""
    made: dict[int, str] = {}
    for event in events:
        number = event.get("args", {}).get("Sequence number", -1)
        if number >= 0 and not event["name"].startswith(NODE) and (piece := forward.find(event["ts"])) is not None:
            made[number] = piece.name  # the last operation of a number has made the node, the others only called it
    open_: Piece | None = None
    for event in events:
        action = actions.find(event["ts"]) if event["name"].startswith(NODE) else None
        if action is None or _split(action.name)[1] not in "BI" or (open_ is not None and event["ts"] < open_.end):
            continue  # no node, or one inside another: something is computed again
        start, end = event["ts"], event["ts"] + event["dur"]
        before = open_.name if open_ is not None and open_.action == action.name else "losses"
        name = made.get(event["args"].get("Sequence number", -1), before)
        if open_ is not None and (open_.name, open_.action) == (name, action.name) and open_.start >= action.start:
            open_ = open_._replace(end=end)
            continue
        if open_ is not None:
            yield open_
        open_ = Piece(name, action.name, start, end)
    if open_ is not None:
        yield open_


def _fly(marks: Iterable[Range]) -> Iterator[tuple[Range, Range]]:
    """What leaves, each with its landing."""
    leaving: dict[str, Range] = {}
    for each in marks:
        what, _, key = each.name.partition(" ")
        if what == "leave":
            leaving[key] = each
        elif key in leaving:
            yield leaving.pop(key), each


def _ranges(events: Iterable[Raw], pattern: str) -> Iterator[Range]:
    for event in events:
        if re.fullmatch(pattern, event["name"]):
            yield Range(event["name"], event["ts"], event["ts"] + event["dur"])


def _outermost(ranges: Sequence[Range]) -> list[Range]:
    """Those that lie in no other, in order."""
    found: list[Range] = []
    for each in sorted(ranges, key=lambda each: (each.start, -each.end)):
        if not found or each.start >= found[-1].end:
            found.append(each)
    return found


def _innermost(ranges: Sequence[Any]) -> Iterator[Any]:
    """Nested ``ranges``, in the order of their starts, without the time that ranges inside them take."""
    open_: list[Any] = []  # each with what is left of it

    def close(until: float) -> Iterator[Any]:
        while open_ and open_[-1].end <= until:
            done = open_.pop()
            if done.start < done.end:
                yield done
            if open_:
                open_[-1] = open_[-1]._replace(start=done.end)

    for each in ranges:
        yield from close(each.start)
        if open_ and open_[-1].start < each.start:
            yield open_[-1]._replace(end=each.start)
        open_.append(each)
    yield from close(float("inf"))


def _qualify(ranges: Sequence[Range]) -> Iterator[Range]:
    """Segments; those of a whole block get its name in front: layers.2.block, experts -> layers.2.experts."""
    outer: Range | None = None
    for each, after in zip(ranges, [*ranges, None][1:], strict=True):
        if outer is not None and each.start >= outer.end:
            outer = None
        if after is not None and after.start < each.end:
            outer = each
        else:
            yield each if outer is None else each._replace(name=outer.name.removesuffix("block") + each.name)


def _place(transfers: Iterable[Transfer]) -> Iterator[tuple[int, Transfer]]:
    """Every transfer with a row in which it overlaps none."""
    ends: list[float] = []
    for each in transfers:
        row = next((row for row, end in enumerate(ends) if end <= each.start), len(ends))
        ends[row : row + 1] = [each.end]
        yield row, each


def _split(action: str) -> tuple[str, str, str]:
    found = re.fullmatch(ACTION, action)
    assert found is not None, action
    return found[1], found[2], found[3]


def _name(action: Range | None) -> str:
    return action.name if action is not None else ""


def _kind(name: str) -> str:
    """c10d::alltoall_base_ and gloo:all_to_all are of a kind."""
    return re.sub(r"base|_|single|tensor", "", name.rpartition(":")[2])


def _find_memory(events: Sequence[Raw]) -> list[tuple[float, float]]:
    """What is allocated, whenever that changes: on an accelerator, if there is one, else on the CPU."""
    changes = [event for event in events if event["name"] == "[memory]"]
    device = max((event["args"]["Device Type"] for event in changes), default=0)  # the CPU is device type 0
    return [(each["ts"], each["args"]["Total Allocated"]) for each in changes if each["args"]["Device Type"] == device]


def _complete(rank: int, row: int, name: str, cat: str, start: float, end: float) -> Raw:
    return {"ph": "X", "name": name, "cat": cat, "pid": rank, "tid": row, "ts": round(start, 3),
            "dur": round(end - start, 3)}  # fmt: skip


def _call(what: str, rank: int, row: int, name: str) -> Raw:
    return {"ph": "M", "name": what, "pid": rank, "tid": row, "args": {"name": name}}
