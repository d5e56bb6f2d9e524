"""What surrounds a rank's whole run: its heartbeat, and its record where it ends by a fault."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.schema import TrainConfig
from parallel.mesh import Mesh
from training.checkpoint import fence, folders, state
from training.health.beat import keep_error
from training.health.faults import come_through
from training.health.memory import OutOfMemoryError, explain, ran_out
from training.health.pulse import Pulse
from training.ledger import Ledger, open_ledger
from training.setup import Setup


class Attendance:
    """What is known of the run so far."""

    def __init__(self, pulse: Pulse, ledger: Ledger) -> None:
        self._pulse, self.ledger = pulse, ledger
        self._setup: Setup | None = None  # once there is one
        self._progress = state.Progress()
        self._begun = 0

    def follow(self, setup: Setup, say: Callable[[str], None]) -> None:
        """From now on the rank is to make progress. ``say`` takes lines for a person."""
        self._setup = setup
        self._pulse.watch(True, say)

    def begin(self, progress: state.Progress) -> None:
        """``progress`` is how far the run has come, and goes along with it."""
        self._progress, self._begun = progress, progress.step

    def leave(self) -> None:
        """What comes now takes the time that it takes."""
        self._pulse.watch(False)

    def explain(self, error: Exception) -> Exception:
        """What is raised in place of ``error``: the same, but where memory has run out."""
        if self._setup is None or not ran_out(error):
            return error
        words = explain(error, self._setup)
        return OutOfMemoryError(words) if self._progress.step > self._begun else ValueError(words)


@contextmanager
def attend(mesh: Mesh, config: TrainConfig, folder: Path, price: float) -> Iterator[Attendance]:
    """While entered, the rank has a heartbeat in the run's ``folder``; an exception is kept there before it goes on.
    So is, by rank 0, where time goes; ``price``: of all devices, an hour.

    One that says that memory has run out becomes a ValueError with what to change, or an ``OutOfMemoryError`` where
    steps have been taken, for which the memory was enough.
    """
    rank, world = mesh.rank, mesh.topology.world
    faults = come_through(
        config.health.faults, folder, folders.find_root(config.checkpoint.folder, folder), rank, world
    )
    opened = open_ledger(folder, rank == 0, world, price)
    with opened as ledger, Pulse(config.health, folder, rank, world) as pulse, faults:
        attendance = Attendance(pulse, ledger)
        try:
            yield attendance
        except Exception as error:
            explained = attendance.explain(error)
            if explained is not error:
                explained.__cause__ = error
            if not isinstance(error, fence.SupersededError):  # the folder of records is another attempt's
                keep_error(folder, rank, explained)
            if explained is error:
                raise
            raise explained from error
