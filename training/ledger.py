"""Where the time of all devices went, and the money: every nanosecond of every attempt in one of a few named parts.

    runs/<id>/ledger.jsonl        a line for each attempt that is over, for ever
              ledger.open.json    the one that is under way, anew every second

    useful        steps that were taken for the first time
    recomputed    steps that an earlier attempt had taken
    checkpoints   steps that waited for a copy, and the last one's way to disk
    evaluation    on held-out text
    restarts      from the end of an attempt that did not finish until the next one's first step
    setup         until the first step else
    ending        weights, a sample of text
    other         between steps; and what a killed attempt did behind its last whole step

An attempt begins when whoever holds its devices (a job, the program that started the ranks, or this process) was
started or has made the run's folder, whichever is later; or where the holder's last attempt ended: a dead attempt's
devices are paid for until the next one has them. What killed attempts leave open, the next one closes: at the last sign
of life that there is. The clock is rank 0's.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from training.health.beat import HEARTBEAT, RECORD
from training.holder import Holder, find_holder

PARTS = ("useful", "recomputed", "checkpoints", "evaluation", "restarts", "setup", "ending", "other")
FILE, OPEN = "ledger.jsonl", "ledger.open.json"
SECOND = 10**9  # ns
FINISHED, KILLED, FAILED = "finished", "killed", "failed"
UNCLOSED = "not closed"  # of an attempt that somebody looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A line. Times are nanoseconds of the machine's clock; the parts add up to ``end`` - ``begin``."""

    attempt: int  # from 1
    holder: str
    ranks: int
    price: float  # of all devices, an hour
    begin: int
    end: int
    ending: str
    next: int | None  # step that it would have taken next; None: it came to none
    highest: int  # steps that were ever taken
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))


class Spent(NamedTuple):
    """On a part of a run."""

    hours: float  # of devices
    money: float


class Ledger:
    """That of a run, as one attempt keeps it. Ranks other than 0 keep nothing."""

    def __init__(
        self,
        run: Path,
        kept: bool,
        ranks: int,
        price: float,
        holder: Holder,
        now: Callable[[], int] | None = None,
    ) -> None:
        """``run`` is its folder; ``price`` that of all devices, an hour; ``now``: the time in ns."""
        self.run, self._kept, self._now = run, kept, now or _start_clock()
        self.earlier = close_open(run, holder.started) if kept else []
        last = self.earlier[-1] if self.earlier else None
        opened = self._now()
        since = (
            holder.since if last is None else last.end if last.holder == holder.name else max(holder.since, last.end)
        )
        begin = min(since, opened)
        highest = 0 if last is None else last.highest
        self._part = "setup" if last is None or last.ending == FINISHED else "restarts"
        self._mark, self._saved = begin, 0
        self.attempt = Attempt(
            attempt=len(self.earlier) + 1,
            holder=holder.name,
            ranks=ranks,
            price=price,
            begin=begin,
            end=opened,
            ending=KILLED,  # until it is known better
            next=None,
            highest=highest,
        )
        self._keep()

    def switch(self, part: str) -> str:
        """From now on time is spent on ``part``. Returns what it was spent on."""
        now, before = self._now(), self._part
        self.attempt.parts[before] += now - self._mark
        self._part, self._mark = part, now
        return before

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """Time inside is spent on ``part``, and on no other that is around it."""
        before = self.switch(part)
        try:
            yield
        finally:
            self.switch(before)

    def stepping(self, step: int) -> str:
        """The part that time in ``step`` is spent on."""
        return "useful" if step >= self.attempt.highest else "recomputed"

    def take(self, step: int) -> None:
        """``step`` has been taken."""
        self.attempt = replace(self.attempt, next=step + 1, highest=max(self.attempt.highest, step + 1))
        if self._now() - self._saved > SECOND:
            self._keep()

    def close(self, ending: str) -> None:
        """The attempt is over. A second call does nothing."""
        if self.attempt.ending == KILLED:
            self.switch("other")
            self.attempt = replace(self.attempt, end=self._mark, ending=ending)
            if self._kept:
                append(self.run, self.attempt)

    def count_cost(self) -> float:
        """Of the run so far."""
        return sum(_count_cost(attempt, attempt.end - attempt.begin) for attempt in (*self.earlier, self.attempt))

    def describe(self) -> list[str]:
        """The run so far, in a line or two."""
        return describe([*self.earlier, self.attempt])

    def _keep(self) -> None:
        self._saved = self._now()
        if not self._kept:
            return
        self.switch(self._part)
        path = self.run / OPEN
        partial = path.with_name(f"{OPEN}.partial")
        with suppress(OSError):  # a full disk is no reason to stop
            partial.write_text(json.dumps(asdict(replace(self.attempt, end=self._mark))), encoding="utf-8")
            partial.replace(path)


@contextmanager
def open_ledger(run: Path, kept: bool, ranks: int, price: float) -> Iterator[Ledger]:
    """That of the run in the folder ``run``. Who leaves without having closed it has failed."""
    holder = find_holder(os.environ)
    described = run / "config.yaml"  # which whoever starts an attempt writes first
    made = described.stat().st_mtime_ns if described.is_file() else time.time_ns()
    ledger = Ledger(run, kept, ranks, price, holder._replace(since=max(holder.since, made)))
    try:
        yield ledger
    finally:
        ledger.close(FAILED)


def read(folder: Path) -> list[Attempt]:
    """The attempts of a run that are over."""
    path = folder / FILE
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [Attempt(**json.loads(line)) for line in lines if line.endswith("\n")]


def append(folder: Path, attempt: Attempt) -> None:
    """Keeps an attempt that is over."""
    with suppress(OSError):
        with (folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(attempt)) + "\n")
        (folder / OPEN).unlink(missing_ok=True)


def close_open(folder: Path, before: int) -> list[Attempt]:
    """All attempts of a run: one that was killed is closed where it last gave a sign of life, ``before`` which (ns) it
    was over."""
    known = read(folder)
    try:
        left = Attempt(**json.loads((folder / OPEN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return known
    if left.attempt > len(known):
        append(folder, left := end_killed(folder, left, before))
        return [*known, left]
    (folder / OPEN).unlink()
    return known


def end_killed(folder: Path, left: Attempt, before: int) -> Attempt:
    """``left`` with what it did after it was last written down: whole steps, as the record has them, and the rest."""
    death = max([left.end, *(sign for sign in find_signs(folder) if sign < before)])
    parts, spare, highest, following = dict(left.parts), death - left.end, left.highest, left.next
    for row in _read_steps(folder):
        if following is None or row["step"] < following:
            continue
        spent = min(spare, int(row["seconds"] * SECOND))
        parts["useful" if row["step"] >= highest else "recomputed"] += spent
        spare, following = spare - spent, row["step"] + 1
        highest = max(highest, following)
    parts["other"] += spare
    return replace(left, end=death, ending=KILLED, parts=parts, highest=highest, next=following)


def find_signs(folder: Path) -> Iterator[int]:
    """When (ns) ranks of a run were known to be alive: its record, heartbeats, last words, also of logs that were set
    aside last."""
    with suppress(OSError):
        yield (folder / "metrics.jsonl").stat().st_mtime_ns
    aside = sorted(folder.glob("before/*/logs"), key=lambda path: int(path.parent.name))[-1:]
    for logs in (folder / "logs", *aside):
        for path in (path for name in (HEARTBEAT, RECORD) for path in logs.glob(f"rank*/{name}")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                yield int(json.loads(path.read_text(encoding="utf-8"))["time"])


def look(folder: Path) -> list[Attempt]:
    """A run's attempts as they are written down, the one that is open included. Changes nothing, so anybody may ask."""
    known = read(folder)
    with suppress(OSError, ValueError, TypeError):
        left = Attempt(**json.loads((folder / OPEN).read_text(encoding="utf-8")))
        known += [replace(left, ending=UNCLOSED)] if left.attempt > len(known) else []
    return known


def sum_parts(attempts: list[Attempt]) -> dict[str, Spent]:
    """What each part has used, over all attempts and their devices."""
    return {
        part: Spent(
            sum(attempt.ranks * attempt.parts[part] / SECOND / 3600 for attempt in attempts),
            sum(_count_cost(attempt, attempt.parts[part]) for attempt in attempts),
        )
        for part in PARTS
    }


def write_hours(hours: float) -> str:
    """Device-hours in words; in seconds, where there are few."""
    return f"{hours:,.2f} device-hours" if hours >= 0.01 else f"{hours * 3600:.1f} device-seconds"


def describe(attempts: list[Attempt]) -> list[str]:
    """A run's attempts in a line, and in another one what they have cost, where that is known."""
    spent = sum_parts(attempts)
    hours = sum(each.hours for each in spent.values())
    times = f" in {len(attempts)} attempts" if len(attempts) > 1 else ""
    shares = {part: each.hours / (hours or 1.0) for part, each in spent.items()}
    shown = ", ".join(f"{part} {share:.1%}" for part, share in shares.items() if share >= 0.0005)
    lines = [f"{write_hours(hours)}{times}: {shown}"]
    if cost := sum(each.money for each in spent.values()):
        parts = ", ".join(f"{part} {each.money:.2f}" for part, each in spent.items() if each.money >= 0.005)
        lines.append(f"cost {cost:.2f}" + (f": {parts}" if parts else ""))
    return lines


def _count_cost(attempt: Attempt, spent: int) -> float:
    return attempt.price * spent / SECOND / 3600


def _read_steps(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n") and (row := json.loads(line))["kind"] == "step":
            yield row


def _start_clock() -> Callable[[], int]:
    """The time of day, which goes on from here at an even pace whatever is done to the machine's clock."""
    ahead = time.time_ns() - time.monotonic_ns()
    return lambda: ahead + time.monotonic_ns()
