"""Who is told of every step of a run, each for a reason of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from training.checkpoint.keeper import Keeper
from training.checkpoint.state import Progress
from training.interrupt import Interrupt
from training.metrics import Record
from training.profile import Profile
from training.setup import Setup
from training.view import Gauge, View, open_view


class Watchers(NamedTuple):
    """All of them, on one rank."""

    record: Record
    view: View
    gauge: Gauge
    interrupt: Interrupt
    keeper: Keeper
    profile: Profile


@contextmanager
def watch(setup: Setup, progress: Progress, folder: Path, record: Record, price: float) -> Iterator[Watchers]:
    """They watch a run from ``progress`` on. ``folder`` is the run's; ``price`` that of all devices, an hour."""
    gauge = Gauge(setup.config, setup.schedule, setup.machine, price, progress.seconds)
    with open_view(gauge) as view, Interrupt(view.note) as interrupt:
        keeper = Keeper(setup, folder, record, view.note, progress.step)
        yield Watchers(record, view, gauge, interrupt, keeper, Profile(setup, folder, view.note))
