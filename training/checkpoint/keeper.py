"""Saves a run while it goes on: a step waits for a copy in memory, never for a disk.

    save      every rank copies its part (training/checkpoint/staging.py) --> and goes on
    writing   every rank, in a thread of its own: its file, its part of the manifest
    commit    once all are done, which ranks tell each other between steps: rank 0 renames the manifest into place,
              in that thread; then removes checkpoints that are no longer kept

A rank that cannot write, because a disk is full for example, does not end the run: what was written is removed, the
reason is said, and the next checkpoint is tried when it is due.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Literal, NamedTuple

from training.agree import agree, tell
from training.checkpoint import folders
from training.checkpoint.part import FAILURES, commit, write_part
from training.checkpoint.staging import Staging
from training.checkpoint.state import Progress, collect, describe
from training.metrics import Record
from training.setup import Setup

Phase = Literal["idle", "writing", "committing"]  # what becomes of the checkpoint that was begun last


class Signs(NamedTuple):
    """What ranks tell each other between two steps: each is set if it is on any rank."""

    asked: bool  # to stop
    due: bool  # a checkpoint, by the clock of rank 0
    busy: bool  # in the background
    failed: bool  # there


class Saved(NamedTuple):
    """A checkpoint that has been begun."""

    step: int
    started: float
    stall: float  # seconds that the step waited


class Done(NamedTuple):
    """What was done in the background."""

    size: int  # bytes of values
    seconds: float  # since the checkpoint was begun


class Keeper:
    """The checkpoints of a run. Every rank has one, and all of them call the same methods in the same order."""

    def __init__(self, setup: Setup, folder: Path, record: Record, note: Callable[[str], None], begun: int) -> None:
        """``folder`` is the run's; ``note`` takes lines for a person; ``begun``: the first step that is taken."""
        self._setup, self._root = setup, folder / folders.FOLDER
        self._record, self._note = record, note
        self._how = setup.config.checkpoint
        self._first = setup.mesh.rank == 0
        self._staging = Staging(setup.mesh.device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[Done] | None = None
        self._phase: Phase = "idle"
        self._saved: Saved | None = None
        self._last = begun  # the step of the newest checkpoint, or of the beginning, which needs none
        self._count = 0  # checkpoints saved
        self._began = monotonic()  # waiting for the next one by the clock

    def signs(self, asked: bool) -> Signs:
        """This rank's, for all to agree on (training/agree.py)."""
        minutes = self._how.minutes
        waiting = self._first and self._phase == "idle" and minutes is not None
        due = waiting and monotonic() - self._began >= 60 * (minutes or 0.0)
        done = self._work is None or self._work.done()
        return Signs(asked, due, not done, done and self._work is not None and self._work.exception() is not None)

    def follow(self, signs: Signs) -> None:
        """Goes on with the checkpoint that is under way, as far as all ranks are with it. Collective."""
        if self._phase == "idle" or signs.busy:
            return
        if signs.failed:
            self._give_up()
        elif self._phase == "writing":
            self._phase, self._work = "committing", self._submit(self._commit) if self._first else None
        else:
            self._conclude()

    def is_due(self, step: int, signs: Signs) -> bool:
        """Whether a checkpoint after ``step`` steps is to be saved now; ``signs`` are those of all ranks."""
        return signs.due or bool(self._how.every and step % self._how.every == 0)

    def save(self, progress: Progress) -> None:
        """Begins a checkpoint. Collective. Waits for the one before, if that is still under way."""
        started = monotonic()
        self.settle()
        if progress.step == self._last:
            return
        folder = folders.locate(self._root, progress.step)
        staged = self._staging.take(collect(self._setup))
        facts = describe(self._setup, progress) if self._first else {}
        stall = monotonic() - started
        self._saved, self._phase, self._began = Saved(progress.step, started, stall), "writing", monotonic()
        rank = self._setup.mesh.rank
        self._work = self._submit(lambda: Done(write_part(folder, rank, staged, facts), monotonic() - started))

    def settle(self) -> None:
        """Returns when nothing is under way. Collective."""
        while self._phase != "idle":
            if self._work is not None:
                self._work.exception()  # waits
            self.follow(agree(self._setup.mesh, self.signs(asked=False)))

    def close(self, progress: Progress, wanted: bool, interrupted: bool) -> None:
        """The run ends. Its end is kept where it is ``wanted``: where the run was long enough for checkpoints, and
        where it was ``interrupted``. Returns when all is on disk. Collective.
        """
        on = bool(self._how.every) or (self._how.minutes is not None and (interrupted or self._count))
        if wanted and on:
            self.save(progress)
        self.settle()
        self._thread.shutdown()

    def _submit(self, work: Callable[[], Done]) -> "Future[Done]":
        return self._thread.submit(work)

    def _commit(self) -> Done:
        assert self._saved is not None
        self._record.sync()  # no step that a run goes on behind is missing from it
        size = commit(folders.locate(self._root, self._saved.step), self._setup.mesh.topology.world)
        folders.prune(self._root, self._how.keep, self._how.keep_every)
        return Done(size, monotonic() - self._saved.started)

    def _conclude(self) -> None:
        assert self._saved is not None
        self._last, self._count = self._saved.step, self._count + 1
        if self._first:
            assert self._work is not None
            size, seconds = self._work.result()
            self._record.write(
                "checkpoint", step=self._saved.step, bytes=size, seconds=seconds, stall_seconds=self._saved.stall
            )
            self._note(
                f"checkpoint after step {self._saved.step}: {size / 1e6:.1f} MB, there after {seconds:.2f} s; "
                f"the run waited {self._saved.stall:.3f} s"
            )
        self._phase, self._work = "idle", None

    def _give_up(self) -> None:
        """What could not be written is no reason to end; any other error is a fault of ours."""
        assert self._saved is not None
        error = self._work.exception() if self._work is not None else None
        if error is not None and not isinstance(error, FAILURES):
            raise error
        reasons = tell(self._setup.mesh, "" if error is None else f"rank {self._setup.mesh.rank}: {error}")
        folder = folders.locate(self._root, self._saved.step)
        if self._first:
            folders.discard(folder)
            self._record.write("checkpoint_failed", step=self._saved.step, reasons=reasons)
        self._note(f"no checkpoint after step {self._saved.step}: {'; '.join(reasons)}. The run goes on")
        self._phase, self._work = "idle", None
