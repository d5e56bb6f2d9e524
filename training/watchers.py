"""Who is told of every step of a run, each for a reason of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from training.checkpoint import keeper as durable
from training.checkpoint import neighbour as near
from training.checkpoint import state
from training.health.fingerprint import Fingerprints
from training.interrupt import Interrupt
from training.metrics import Record
from training.profile import Profile
from training.setup import Setup
from training.telemetry import sample_devices
from training.view import Gauge, View, open_view

if TYPE_CHECKING:
    from training.ledger import Ledger


class Watchers(NamedTuple):
    """All of them, on one rank."""

    record: Record
    view: View
    gauge: Gauge
    interrupt: Interrupt
    keeper: durable.Keeper
    profile: Profile
    fingerprints: Fingerprints
    neighbour: near.Neighbour
    ledger: "Ledger"


@contextmanager
def watch(setup: Setup, progress: state.Progress, folder: Path, record: Record, ledger: "Ledger") -> Iterator[Watchers]:
    """They watch a run from ``progress`` on, ``folder`` is the run's."""
    gauge = Gauge(setup.config, setup.schedule, setup.machine, ledger.attempt.price, progress.seconds)
    sampled = sample_devices(setup.config.telemetry.every, setup.mesh, folder, record)
    with sampled, open_view(gauge) as view, Interrupt(view.note) as interrupt:
        fingerprints = Fingerprints(setup, setup.config.health.verify_every)
        saved = -1 if progress.near else progress.step
        keeper = durable.Keeper(setup, folder, record, view.note, saved, fingerprints.expect)
        neighbour = near.Neighbour(setup, folder, record, view.note, progress.step, fingerprints.expect)
        profile = Profile(setup, folder, view.note)
        yield Watchers(record, view, gauge, interrupt, keeper, profile, fingerprints, neighbour, ledger)
