"""The record of a run: one row a step, written as it happens, and the same rows to whatever sinks are asked for.

    metrics.jsonl    {"kind": "start", ...}                            once
                     {"kind": "step", "step": 0, "loss": 5.6, ...}     every step: the fields of ``StepRow``
                     {"kind": "load", "step": 0, "load": [[9, 7], ..]} now and then: tokens of every expert by layer
                     {"kind": "eval", "step": 100, "loss": 2.1, ...}   every evaluation
                     {"kind": "checkpoint", "step": 100, ...}          every checkpoint: bytes, how long steps waited
                     {"kind": "retry", "step": 100}                    a step that was finite when taken again
                     {"kind": "resume", "step": 100, ...}              where a run went on from one
                     {"kind": "device", "time": ..., "rank": 3, ...}   now and then: training/telemetry.py
                     {"kind": "end", ...}                              once

Losses are nats a token. A number that is not finite is null, which JSON can say. Each line goes to the operating system
as soon as it is complete, so a crash of the process loses none.

Loads [L, E] are counts of one step's whole global batch, routed layers in the model's order, those of multi-token
prediction last. They are of every ``spacing(run.steps)``-th step and of the last: some ``LOADS`` rows however long a
run is. Preset deepseek_v3, 59 layers of 256 experts: 27 MB beside 125 MB of 243,261 steps. A row comes before that of
its step: who reads the last lines of a record finds a step there.
"""

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

STEPPED = ("step", "load", "eval")  # rows of what is done at a step, which a run that is resumed may do again
LOADS = 200  # rows of kind "load" in a run, and one more at its end


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRow:
    """What one step did."""

    step: int  # from 0
    loss: float  # cross entropy of the next token, over the global batch
    mtp_losses: tuple[float, ...]  # the same at each further depth
    aux: float  # auxiliary balance loss a sequence, summed over layers, before its weight
    lr: float
    grad_norm: float  # before clipping
    clip_factor: float  # what clipping multiplied the gradient by
    tokens: int  # inputs seen in this step
    cursor: int  # sequences seen since the start, this step included
    seconds: float
    tokens_per_second: float
    violation_worst: float  # max / mean - 1 of the tokens an expert gets, in the worst layer
    violation_mean: float  # and averaged over layers
    dead_experts: int  # experts, of all layers together, that got no token
    moved_experts: int  # experts, of all layers together, that changed ranks after the step
    nodes_touched: float  # machines on which a token has experts in a layer, mean; 0 where experts are not spread
    bytes_inside: int  # of tokens sent to experts on other ranks of a machine, one way, all layers and ranks
    bytes_across: int  # the same to other machines
    skipped: bool  # loss or gradient were not finite: the weights have not moved
    peak_memory: int  # bytes
    load: tuple[tuple[int, ...], ...] = ()  # tokens of every expert, layer by layer, in a step that shows them


def spacing(steps: int) -> int:
    """From one step whose loads are recorded to the next, in a run of so many."""
    return max(1, -(-steps // LOADS))


def shows_load(step: int, steps: int) -> bool:
    """Whether ``step`` of ``steps`` is one whose loads are recorded."""
    return step % spacing(steps) == 0 or step == steps - 1


class Writer(Protocol):
    """Somewhere that rows go."""

    def rewind(self, step: int) -> None:
        """A run begins, or goes on: ``step`` and all later ones come anew."""

    def write(self, row: dict[str, Any]) -> None:
        """Takes one row."""

    def close(self) -> None:
        """Takes no more."""


class Record:
    """``metrics.jsonl`` in a run's folder, and its sinks. A context manager."""

    def __init__(self, path: Path, writers: Iterable[Writer] = ()) -> None:
        self._path = path
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._writers = tuple(writers)
        self._lock = threading.Lock()  # rows come from more than one thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        for writer in self._writers:
            writer.close()

    def rewind(self, step: int) -> None:
        """Forgets ``step`` and all later ones, and the end: they come anew. A line that was cut off goes too."""
        with self._lock:
            self._file.close()
            if self._path.is_file():
                partial = self._path.with_name(f"{self._path.name}.partial")
                partial.write_text("".join(_keep(self._path, step)), encoding="utf-8")
                partial.replace(self._path)
            self._file = self._path.open("a", buffering=1, encoding="utf-8")
            for writer in self._writers:
                writer.rewind(step)

    def sync(self) -> None:
        """What was written is on disk."""
        if self._path.is_file():
            os.fsync(self._file.fileno())

    def write_step(self, row: StepRow) -> None:
        """Adds a step, behind its loads if it shows them."""
        fields = asdict(row)
        if load := fields.pop("load"):
            self.write("load", step=row.step, load=load)
        self.write("step", **fields)

    def write(self, kind: str, **fields: Any) -> None:
        """Adds a row of any ``kind``."""
        row = {"kind": kind, **fields}
        line = json.dumps(_without_nan(row), allow_nan=False) + "\n"
        with self._lock:
            self._file.write(line)
            for writer in self._writers:
                writer.write(row)


def _keep(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            return
        row = json.loads(line)
        if row["kind"] != "end" and (row["kind"] not in STEPPED or row["step"] < step):
            yield line


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one ``kind`` in a ``metrics.jsonl``."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [row for row in rows if row["kind"] == kind]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
