"""The record of a run as plain series: ``metrics.jsonl``, read once from its beginning to its end, line by line.

    steps [N], each of FIELDS [N]     rows "step", counted from 1 as a run prints them; NaN: not finite
    loads [T, L]                      rows "load": the maximal violation of each routed layer
    experts [L, E]                    the last of these rows: its counts

What a line says is not trusted: one that is no row is left out, and so is a number that is none. Rows of steps are
alike but for their numbers, so these are cut out of a line at once; one that differs is parsed as any other. (A million
steps are half a gigabyte: that halves the time.)
"""

import json
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Numbers of a step's row that the page draws or adds up.
FIELDS = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory",
    "violation_worst",
    "violation_mean",
    "dead_experts",
    "skipped",
)
TOLD = ("retry", "checkpoint_failed")  # kinds that are listed, as they are few
LARGEST = 1e30  # what is beyond is no measurement
SIGN, NUMBERS = b', "', b"0123456789.+-e"  # what lies between fields of a line, and what numbers are made of


class Cut(NamedTuple):
    """Where the numbers of a step are in a line: its fields lie between SIGNs."""

    rest: bytes  # the line without NUMBERS
    places: tuple[tuple[int, int], ...]  # of FIELDS but the last: which field of the line, and where in it

    @classmethod
    def like(cls, line: bytes, row: dict[str, Any]) -> "Cut | None":
        """As in this ``line``, which says ``row``; None if its fields cannot be told apart so simply."""
        names = list(row)
        if row.get("skipped") is not False or len(line.split(SIGN)) != len(names) or not set(FIELDS) <= row.keys():
            return None
        return cls(line.translate(None, NUMBERS), tuple((names.index(name), len(name) + 3) for name in FIELDS[:-1]))

    def read(self, line: bytes) -> list[float] | None:
        """The numbers of FIELDS; None if the line differs in anything but its numbers."""
        if line.translate(None, NUMBERS) != self.rest:
            return None
        parts = line[:-2].split(SIGN)
        try:
            return [*[float(parts[place][start:]) for place, start in self.places], 0.0]
        except (ValueError, IndexError):
            return None


class Event(NamedTuple):
    """Something that happened at a step."""

    step: int
    kind: str  # one of TOLD


class Loads(NamedTuple):
    """What rows of kind "load" say."""

    steps: np.ndarray  # [T], from 1
    violations: np.ndarray  # [T, L]: max / mean - 1
    experts: np.ndarray  # [L, E]: counts, of the last one


@dataclass(slots=True, kw_only=True)
class Record:
    """All of it. Steps are counted from 1."""

    series: dict[str, np.ndarray]  # FIELDS [N]
    held_out: list[tuple[int, float]] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)  # the steps that came first again
    starts: list[dict[str, Any]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    loads: Loads | None = None
    ending: dict[str, Any] = field(default_factory=dict)  # the last row, if the run has come to its end
    left_out: int = 0  # lines that are no rows

    @property
    def start(self) -> dict[str, Any]:
        """What the run said of itself when it last began."""
        return self.starts[-1] if self.starts else {}

    @property
    def steps(self) -> np.ndarray:
        """[N], ascending."""
        return self.series["step"]

    def last(self, name: str) -> float:
        """The last of a series that is a number; NaN where there is none."""
        found = self.series[name][np.isfinite(self.series[name])]
        return float(found[-1]) if len(found) else math.nan


def read_record(path: Path) -> Record:
    """The record in ``path``; an empty one where there is no such file."""
    record, flat = Record(series={}), array("d")
    loads: list[tuple[float, np.ndarray]] = []
    last: dict[str, Any] = {}
    cut: Cut | None = None
    for line in _list_lines(path):
        if cut is not None and (numbers := cut.read(line)) is not None:
            flat.extend(numbers)
            last = {}
        elif (row := _parse(line)) is None:
            record.left_out += 1
        else:
            last = row
            if row.get("kind") == "step":
                flat.extend(number(row.get(name)) for name in FIELDS)
                cut = Cut.like(line, row)
            else:
                _take(row, record, loads)
    table = np.array(flat).reshape(-1, len(FIELDS))
    record.series = dict(zip(FIELDS, _order(table).T, strict=True))
    record.ending = last if last.get("kind") == "end" else {}
    record.loads = _join(loads)
    return record


def number(value: object) -> float:
    """``value`` if it is a number that can be drawn, else NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST else math.nan


def _list_lines(path: Path) -> Iterator[bytes]:
    """Whole lines: the last one of a run that goes on, or was killed, may be cut off."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _order(table: np.ndarray) -> np.ndarray:
    """Rows by ascending step, of each step the last one: a record is like that, unless somebody has edited it.

    Steps are counted from 1. One that was skipped has moved nothing: its loss and norm are those of a fault.
    """
    table = np.where(np.abs(table) <= LARGEST, table, np.nan)
    table = table[np.isfinite(table[:, 0])]
    table[:, 0] += 1
    for name in ("loss", "grad_norm"):
        table[table[:, FIELDS.index("skipped")] > 0, FIELDS.index(name)] = np.nan
    if len(table) < 2 or (np.diff(table[:, 0]) > 0).all():
        return table
    _, places = np.unique(table[::-1, 0], return_index=True)
    return table[::-1][places]


def _take(row: dict[str, Any], record: Record, loads: list[tuple[float, np.ndarray]]) -> None:
    """A row of any kind but "step"."""
    kind, step = row.get("kind"), number(row.get("step"))
    if kind == "start":
        record.starts.append(row)
    if math.isnan(step):
        return
    place = int(step) + 1
    if kind == "load" and (counts := _read_load(row.get("load"))) is not None:
        loads.append((place, counts))
    elif kind == "eval" and math.isfinite(loss := number(row.get("loss"))):
        record.held_out.append((place, loss))
    elif kind == "resume":
        record.resumed.append(place)
    elif kind == "checkpoint":
        record.checkpoints.append(int(step))
    elif kind in TOLD:
        record.events.append(Event(place, str(kind)))


def _read_load(value: object) -> np.ndarray | None:
    """Counts [L, E], or None for what is none."""
    try:
        counts = np.array(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    return counts if counts.ndim == 2 and counts.size and (counts >= 0).all() and np.isfinite(counts).all() else None


def _join(rows: list[tuple[float, np.ndarray]]) -> Loads | None:
    """Those rows that are of the same model as the last one."""
    rows = [row for row in rows if row[1].shape == rows[-1][1].shape]
    if not rows:
        return None
    violations = np.array([measure_violation(counts) for _, counts in rows])
    return Loads(np.array([step for step, _ in rows]), violations, rows[-1][1])


def measure_violation(counts: np.ndarray) -> np.ndarray:
    """[L, E] -> [L]: max / mean - 1, as model/statistics.py has it; 0 for a layer without tokens."""
    mean = counts.mean(axis=1)
    return np.where(mean > 0, counts.max(axis=1) / np.where(mean > 0, mean, 1) - 1, 0.0)
