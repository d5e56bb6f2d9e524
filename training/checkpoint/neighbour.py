"""Near copies while a run goes on: every few steps, in the memory of this node and in that of another one.

    save      every rank finds room for a copy of all that it would load (training/checkpoint/staging.py), and goes on
    hold      before state next changes: the copy has been made
    writing   in a thread of its own: the copy; a file of it in memory, or on a local disk; then, to the rank of the
              same place on the next node, what it has written, and from the one before what that has
    settled   before the next one all have told each other that they are done: those before the last two go

With one node there is no other, and a copy outlives processes but not the machine.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from time import monotonic

from training.agree import tell
from training.checkpoint import folders, near
from training.checkpoint.part import FAILURES, write_part
from training.checkpoint.post import receive, send
from training.checkpoint.staging import Staged, Staging
from training.checkpoint.state import Progress, describe, hold
from training.metrics import Record
from training.setup import Setup

KEPT = 2  # copies: the last one, and one to go back to where that is damaged


class Neighbour:
    """The near copies of a run. Every rank has one, and all of them call the same methods in the same order."""

    def __init__(
        self,
        setup: Setup,
        folder: Path,
        record: Record,
        note: Callable[[str], None],
        begun: int,
        expect: Callable[[int], Callable[..., None]],
    ) -> None:
        """``folder`` is the run's; ``note`` takes lines for a person; ``begun``: the first step that is taken, of which
        there may be copies; ``expect`` as for the ``Keeper``. Collective where copies are made.
        """
        self._expect = expect
        self._setup, self._record, self._note = setup, record, note
        self._every = setup.config.checkpoint.near_every
        self._run = near.name_run(setup.config, folder)
        self._root = self._run / near.name_layout(setup.config, setup.mesh.topology)
        self._staging, self._staged = Staging(setup.mesh.device), list[Staged]()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="near")
        self._work: Future[tuple[int, float]] | None = None  # bytes of values, seconds since it was begun
        self._steps = [begun]  # of copies that are there, and of the one that is made
        self._stall = 0.0
        if self._every:
            setup.mesh.aside()  # made by all ranks together, not in the background

    def save(self, progress: Progress) -> None:
        """Begins a copy, if one is due. Collective. Waits for the one before, if that is still under way."""
        if not self._every or progress.step % self._every:
            return
        started = monotonic()
        self._settle()
        staged, facts = self._staging.lay_out(hold(self._setup)), describe(self._setup, progress)
        self._stall = monotonic() - started
        self._steps.append(progress.step)
        folder, check = near.locate(self._root, progress.step), self._expect(progress.step)

        def write() -> tuple[int, float]:
            try:
                copies = staged.fill()
                check(copies)
                folders.make_own(self._run)
                size = write_part(folder, self._setup.mesh.rank, copies, facts)
            finally:  # the neighbours' part goes on where this rank has failed: they wait for it
                self._exchange(folder)
            return size, monotonic() - started

        self._staged, self._work = [staged], self._thread.submit(write)

    def hold(self) -> None:
        """State is about to change: returns once what is to be copied of it has been."""
        while self._staged:
            started = monotonic()
            self._staged.pop().wait()
            self._stall += monotonic() - started

    def close(self, needed: bool) -> None:
        """The run ends. Copies stay where they are ``needed`` to go on. Collective."""
        self._settle()
        self._thread.shutdown()
        if self._every and not needed:
            self._discard(self._run)

    def _exchange(self, folder: Path) -> None:
        mesh = self._setup.mesh
        rank, each, world = mesh.rank, mesh.ranks_per_node, mesh.topology.world
        after, before = (rank + each) % world, (rank - each) % world
        if after == rank:
            return

        def there() -> None:
            send(folder, rank, after, mesh.aside())

        def here() -> None:
            receive(folder, before, before, mesh.aside())

        # Every other node receives first, so that no ring of nodes waits for itself.
        first, second = (here, there) if rank // each % 2 else (there, here)
        try:
            first()
        finally:
            second()

    def _settle(self) -> None:
        """Returns when nothing is under way on any rank. What could not be written is no reason to end."""
        if self._work is None:
            return
        error = self._work.exception()  # waits
        if error is not None and not isinstance(error, FAILURES):
            raise error
        rank, step = self._setup.mesh.rank, self._steps[-1]
        if reasons := tell(self._setup.mesh, "" if error is None else f"rank {rank}: {error}"):
            self._note(f"no near copy after step {step}: {'; '.join(reasons)}. The run goes on")
            self._discard(near.locate(self._root, self._steps.pop()))
        else:
            size, seconds = self._work.result()
            self._record.write("near_copy", step=step, bytes=size, seconds=seconds, stall_seconds=self._stall)
        while len(self._steps) > KEPT:
            self._discard(near.locate(self._root, self._steps.pop(0)))
        self._work = None

    def _discard(self, path: Path) -> None:
        if folders.is_own(self._run):
            folders.discard(path)
