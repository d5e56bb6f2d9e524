"""Saves a run while it goes on: a step waits for a copy in memory, never for a disk.

    save      every rank finds room for a copy of its part (training/checkpoint/staging.py) --> and goes on
    hold      before state next changes: the copy has been made
    writing   every rank, in a thread of its own: the copy, its file, its part of the manifest
    commit    once all are done, which ranks tell each other between steps: rank 0 renames the manifest into place,
              in that thread; then removes checkpoints that are no longer kept
    removing  where a rank could not write: what was written, by rank 0, in that thread

A rank that cannot write, because a disk is full or a store does not answer, does not end the run: what was written is
removed, the reason is said, and the next checkpoint is tried when it is due. A rank of an attempt that has been
superseded (training/checkpoint/fence.py) writes nothing, and ends.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from parallel.doing import doing
from training.agree import agree, tell
from training.checkpoint import fence, folders
from training.checkpoint.interval import Clock, choose_best
from training.checkpoint.part import FAILURES, commit, write_part
from training.checkpoint.staging import Staged, Staging
from training.checkpoint.state import Progress, collect, describe
from training.metrics import Record
from training.setup import Setup

Phase = Literal["idle", "writing", "committing", "removing"]  # what becomes of the checkpoint that was begun last


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
    progress: Progress  # which goes on
    best: tuple[int, ...]  # the steps of the best evaluations then


class Done(NamedTuple):
    """What was done in the background."""

    size: int  # bytes of values
    seconds: float  # since the checkpoint was begun


class Keeper:
    """The checkpoints of a run. Every rank has one, and all of them call the same methods in the same order."""

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        record: Record,
        note: Callable[[str], None],
        begun: int,
        expect: Callable[[int], Callable[..., None]],
    ) -> None:
        """``folder`` is the run's; ``note`` takes lines for a person; ``begun``: the first step that is taken;
        ``expect``: of the state after a step, what raises DamagedError for copies that are not the same.
        """
        self._expect = expect
        self._setup, self._root = setup, folders.find_root(setup.config.checkpoint.folder, folder)
        self._record, self._note = record, note
        self._fence = fence.enter(folder)
        self._how = setup.config.checkpoint
        self._first = setup.mesh.rank == 0
        self._staging, self._staged = Staging(setup.mesh.device), list[Staged]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[Done] | None = None
        self._phase: Phase = "idle"
        self._saved: Saved | None = None
        self._last = begun  # the step of the newest checkpoint, or of the beginning, which needs none
        self._count = 0  # checkpoints saved
        self._clock = Clock(self._how, setup.mesh.topology.world)

    def signs(self, asked: bool) -> Signs:
        """This rank's, for all to agree on (training/agree.py)."""
        due = self._first and self._phase == "idle" and self._clock.is_over()
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
        elif self._phase == "committing":
            self._conclude()
        else:
            self._phase, self._work = "idle", None

    def is_due(self, step: int, signs: Signs) -> bool:
        """Whether a checkpoint after ``step`` steps is to be saved now; ``signs`` are those of all ranks."""
        return signs.due or bool(self._how.every and step % self._how.every == 0)

    def is_best(self, progress: Progress, loss: float) -> bool:
        """Whether ``loss``, that of an evaluation just now, is one of the lowest, which ``progress`` then remembers."""
        progress.best = choose_best(progress.best, loss, progress.step, self._how.keep_best)
        return (loss, progress.step) in progress.best

    @doing("staging a checkpoint")
    def save(self, progress: Progress) -> None:
        """Begins a checkpoint. Collective. Waits for the one before, if that is still under way."""
        started = self._clock.now()
        self.settle()
        if progress.step == self._last:
            return
        folder = folders.locate(self._root, progress.step)
        staged = self._staging.lay_out(collect(self._setup))
        facts = describe(self._setup, progress) if self._first else {}
        stall, best = self._clock.now() - started, tuple(step for _, step in progress.best)
        self._saved, self._phase = Saved(progress.step, started, stall, progress, best), "writing"
        self._clock.begin()
        check = self._expect(progress.step)

        def write() -> Done:
            copies = staged.fill()  # whatever comes then: a step waits for it
            self._fence.check()
            check(copies)
            return Done(write_part(folder, self._setup.mesh.rank, copies, facts), self._clock.now() - started)

        self._staged, self._work = [staged], self._submit(write)

    def hold(self) -> None:
        """State is about to change: returns once what is to be saved of it has been copied."""
        while self._staged:
            started = self._clock.now()
            self._staged.pop().wait()
            assert self._saved is not None
            self._saved = self._saved._replace(stall=self._saved.stall + self._clock.now() - started)

    @doing("waiting for a checkpoint to be on disk")
    def settle(self) -> None:
        """Returns when nothing is under way. Collective."""
        while self._phase != "idle":
            if self._work is not None:
                self._work.exception()  # waits
            self.follow(agree(self._setup.mesh, self.signs(asked=False)))

    def close(self, progress: Progress, wanted: bool, interrupted: bool) -> bool:
        """The run ends. Its end is kept where it is ``wanted``: where the run was long enough for checkpoints, and
        where it was ``interrupted``. Returns when all is on disk: whether the end is. Collective.
        """
        self.settle()  # one that is under way counts
        self._fence.check()
        on = bool(self._how.every) or (self._how.minutes is not None and (interrupted or self._count))
        if wanted and on:
            self.save(progress)
        self.settle()
        self._thread.shutdown()
        return self._last == progress.step

    def _submit(self, work: Callable[[], Done]) -> "Future[Done]":
        return self._thread.submit(work)

    def _commit(self) -> Done:
        assert self._saved is not None
        self._fence.check()
        self._record.sync()  # no step that a run goes on behind is missing from it
        size = commit(folders.locate(self._root, self._saved.step), self._setup.mesh.topology.world)
        folders.prune(self._root, self._how.keep, self._how.keep_every, self._saved.best)
        return Done(size, self._clock.now() - self._saved.started)

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
                f"the run waited {self._saved.stall:.3f} s{self._clock.follow(self._saved.stall, seconds)}"
            )
        self._phase, self._work = "idle", None

    def _give_up(self) -> None:
        """What could not be written is no reason to end; any other error is a fault of ours."""
        assert self._saved is not None
        error = self._work.exception() if self._work is not None else None
        if error is not None and not isinstance(error, FAILURES):
            raise error
        reasons = tell(self._setup.mesh, "" if error is None else f"rank {self._setup.mesh.rank}: {error}")
        progress = self._saved.progress
        progress.best = tuple(entry for entry in progress.best if entry[1] != self._saved.step)
        if self._first:
            self._record.write("checkpoint_failed", step=self._saved.step, reasons=reasons)
        self._note(f"no checkpoint after step {self._saved.step}: {'; '.join(reasons)}. The run goes on")
        self._phase, self._work = "removing", self._submit(self._remove) if self._first else None

    def _remove(self) -> Done:
        assert self._saved is not None
        folders.discard(folders.locate(self._root, self._saved.step))
        return Done(0, self._clock.now() - self._saved.started)
