"""Makes happen what a run is to come through: ``health.faults``, each once in the life of a run.

A function of the interpreter's (``sys.setprofile``) sees which functions are entered and left, and a table says which
of these is the beginning of which phase. So the code that trains knows nothing of faults, and runs at full speed
without them. Faults come one after the other, in the order of the list, each noted in the run's folder before it comes.
"""

import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from training.checkpoint import folders
from training.health.config import FailAt, Fault, Phase, locate_mark, parse
from training.health.harm import DISK_FAULTS, harm

Entrance = tuple[str, str, str]  # a function's module, its name there, and whether it is entered or left
# Phase -> what is entered (call) or left (return) then: of several, whichever is first.
ENTRANCES: dict[Phase, tuple[Entrance, ...]] = {
    Phase.forward: (
        ("training.work", "Training.forward", "call"),
        ("training.work", "Training._unroll", "call"),
    ),
    Phase.exchange: (("parallel.collectives", "all_to_all", "return"),),
    Phase.backward: (("training.work", "Training.backward", "call"), ("training.work", "Training._rewind", "call")),
    Phase.optimizer: tuple(
        (f"training.{module}", f"{name}.step", "call")
        for module, name in (("native", "Native"), ("fsdp2", "Fsdp2"), ("zero", "DeepSpeed"), ("zero3", "Zero3"))
    ),
    Phase.staging: (("training.checkpoint.staging", "Staging.lay_out", "call"),),
    Phase.writing: (("training.checkpoint.files", "name_dtype", "call"),),  # a part of the file is written
    Phase.committing: (("training.checkpoint.manifest", "join", "call"),),
    Phase.loading: (("training.checkpoint.state", "read", "call"),),
}
# Disks fail in what is entered, so that the thread that finds it goes on: one whose hook raises has none any more.
DISK: dict[Phase, tuple[Entrance, ...]] = {
    Phase.writing: (("training.checkpoint.part", "write_part", "call"),),
    Phase.committing: (("training.checkpoint.part", "commit", "call"),),
}
GRADIENT = (("training.native", "Native.accumulate", "call"),)  # where one is at hand, for a NaN to be in it
STEP = ("training.step", "run_step", "call")
SLOW, TIMES = 0.5, 12  # seconds that a slow rank takes longer, so many times: as long as a step, or nobody may notice


@contextmanager
def come_through(texts: Iterable[str], run: Path, root: folders.Place, rank: int, world: int) -> Iterator[None]:
    """While entered, those of the faults ``texts`` that are this rank's happen, but for what has happened before.
    ``root`` has the checkpoints of ``run``.

    Raises ValueError for one of a rank that is none of the ``world`` that there are.
    """
    wanted = [parse(text) for text in texts]
    for fault in wanted:
        if fault.rank >= world:
            raise ValueError(f"health.faults: {fault}: there is no rank {fault.rank}, only {world} in all")
    faults = Faults(wanted, run, root, rank)
    if not faults.has_any():
        yield
        return
    sys.setprofile(faults.look)
    threading.setprofile(faults.look)  # threads that are started from now on: a checkpoint's
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


class Faults:
    """The faults of a run, as one of its ranks sees them."""

    def __init__(self, faults: Sequence[FailAt], run: Path, root: folders.Place, rank: int) -> None:
        self._faults, self._run, self._root, self._rank = faults, run, root, rank
        self._setup: Any = None  # once a step has begun
        self._entrances = {STEP, *(entrance for fault in faults for entrance in find_entrances(fault))}
        self._names = {name for _, name, _ in self._entrances}
        self._step = 0  # as a run prints it
        self._slow: tuple[tuple[Entrance, ...], int] = ((), 0)  # where this rank is slow, and how often it still is

    def has_any(self) -> bool:
        """Whether one of this rank is still to come."""
        return any(fault.rank == self._rank and not self._is_over(n) for n, fault in enumerate(self._faults))

    def look(self, frame: FrameType, event: str, _: object) -> None:
        """For ``sys.setprofile``."""
        if frame.f_code.co_qualname not in self._names:
            return
        here = (str(frame.f_globals.get("__name__")), frame.f_code.co_qualname, event)
        if here not in self._entrances:
            return
        if here == STEP:
            self._step, self._setup = frame.f_locals["step"] + 1, frame.f_locals["setup"]
        if here in self._slow[0] and self._slow[1]:
            self._slow = (self._slow[0], self._slow[1] - 1)
            time.sleep(SLOW)
        number = next((n for n in range(len(self._faults)) if not self._is_over(n)), None)
        if number is None or self._faults[number].rank != self._rank:
            return
        fault = self._faults[number]
        # A rank that loads has taken no step yet: it loads because of the fault before.
        begun = fault.phase is Phase.loading or self._step >= fault.step
        if begun and here in find_entrances(fault) and self._is_time(number):
            place = locate_mark(self._run, self._faults, number)
            place.parent.mkdir(exist_ok=True)
            place.write_text(json.dumps({"time": time.time(), "step": self._step}), encoding="utf-8")
            self._happen(fault, frame)

    def _is_over(self, number: int) -> bool:
        return locate_mark(self._run, self._faults, number).exists()

    def _is_time(self, number: int) -> bool:
        """Whether what the fault before did has been seen, and what the next one is to meet will be there: a disk takes
        as many steps as it takes."""
        coming = self._faults[number + 1] if number + 1 < len(self._faults) else None
        loads = coming is not None and coming.phase is Phase.loading
        # Where the only one is spoilt, a run does not begin again: there has to be one before it.
        if loads and len(folders.find(self._root)) <= (coming is not None and coming.kind is Fault.corrupt):
            return False
        if number and self._faults[number - 1].kind in DISK_FAULTS:  # it is said, then removed
            mark = json.loads(locate_mark(self._run, self._faults, number - 1).read_text(encoding="utf-8"))
            removed = all(step > mark["step"] for step in folders.find_begun(self._root))
            return removed and self._count_failed() >= sum(f.kind in DISK_FAULTS for f in self._faults[:number])
        return True

    def _count_failed(self) -> int:
        """Checkpoints that the run has said it could not write."""
        record = self._run / "metrics.jsonl"
        return record.read_text(encoding="utf-8").count('"kind": "checkpoint_failed"') if record.exists() else 0

    def _happen(self, fault: FailAt, frame: FrameType) -> None:
        if fault.kind is Fault.slow:
            self._slow = (find_entrances(fault), TIMES)
        else:
            harm(fault, {"setup": self._setup, **frame.f_locals})


def find_entrances(fault: FailAt) -> tuple[Entrance, ...]:
    """Where a fault happens."""
    if fault.kind in DISK_FAULTS:
        return DISK[fault.phase]
    return GRADIENT if fault.kind is Fault.nan else ENTRANCES[fault.phase]
