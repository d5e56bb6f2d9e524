"""Configuration of what watches over a run, and faults as data. Standard library only."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple


class Phase(StrEnum):
    """Where in a step, or between two of them, a rank is."""

    forward = "forward"
    exchange = "all-to-all"  # its tokens have left, those of others have not arrived
    backward = "backward"
    optimizer = "optimizer"
    staging = "staging"  # of a checkpoint in memory
    writing = "writing"
    committing = "committing"  # by rank 0 alone
    loading = "loading"


class Fault(StrEnum):
    """What goes wrong."""

    kill = "kill"  # SIGKILL
    term = "term"  # SIGTERM
    segv = "segv"  # SIGSEGV: a library is broken, or memory
    exit = "exit"  # ends without a word
    stop = "stop"  # SIGSTOP: the process is there and does nothing
    stuck = "stuck"  # does not come back
    error = "error"  # an exception
    nan = "nan"  # in a gradient
    flip = "flip"  # of a bit of a weight
    slow = "slow"  # takes longer and longer
    full = "full"  # no room on the disk
    write = "write"  # an error of the disk
    corrupt = "corrupt"  # a bit of the newest checkpoint's file flips
    peer = "peer"  # all connections of the rank are cut


WHERE = {
    Fault.nan: (Phase.backward,),
    Fault.flip: (Phase.forward, Phase.exchange, Phase.backward),
    Fault.slow: (Phase.forward, Phase.exchange, Phase.backward, Phase.optimizer),
    Fault.full: (Phase.writing, Phase.committing),
    Fault.write: (Phase.writing, Phase.committing),
    Fault.corrupt: (Phase.loading,),
}  # other faults happen anywhere


class FailAt(NamedTuple):
    """One fault: once, when ``rank`` is first in ``phase`` at that step or after it. Steps as a run prints them.

    A rank loads whenever it does, because of the fault before.
    """

    rank: int
    step: int
    phase: Phase
    kind: Fault

    def __str__(self) -> str:
        return f"{self.rank}:{self.step}:{self.phase}:{self.kind}"


def parse(text: str) -> FailAt:
    """The inverse of ``str``. Raises ValueError for what is none."""
    words = text.split(":")
    form = f"health.faults: {text} must be rank:step:phase:kind, for example 1:7:backward:kill"
    if len(words) != 4 or not all(word.isdecimal() for word in words[:2]):
        raise ValueError(form)
    for word, kind in zip(words[2:], (Phase, Fault), strict=True):
        if word not in list(kind):
            raise ValueError(f"{form}; {word} is none of {', '.join(kind)}")
    fault = FailAt(int(words[0]), int(words[1]), Phase(words[2]), Fault(words[3]))
    if fault.phase not in WHERE.get(fault.kind, tuple(Phase)):
        raise ValueError(f"health.faults: {text}: {fault.kind} happens in {' or '.join(WHERE[fault.kind])} alone")
    if fault.phase is Phase.committing and fault.rank:
        raise ValueError(f"health.faults: {text}: rank 0 alone is ever committing")
    return fault


def locate_mark(run: Path, faults: Sequence[FailAt], number: int) -> Path:
    """In a run's folder, what is there once one of its faults has happened: when, and in which step."""
    return run / "faults" / f"{number:03}-{str(faults[number]).replace(':', '-')}"


@dataclass(kw_only=True, slots=True)
class HealthConfig:
    """What watches over the ranks of a run (docs/health.md)."""

    heartbeat: float | None = 2.0  # seconds between two; null: none, and nothing of what follows from them
    hang: float = 600.0  # seconds without progress on any rank that are a hang, which ends the run
    slow: float = 1.5  # a rank that computes so many times as long as the others do is named
    window: float = 60.0  # seconds over which that is measured
    verify_every: int = 0  # steps after which all state is hashed, and compared before it is next changed; 0: never
    faults: tuple[str, ...] = ()  # rank:step:phase:kind, that the run is to come through

    def __post_init__(self) -> None:
        for name in ("heartbeat", "hang", "window"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"health.{name}={value} must be positive{' or null' * (name == 'heartbeat')}")
        if self.heartbeat is not None and self.hang < 2 * self.heartbeat:
            raise ValueError(f"health.hang={self.hang} must be at least twice health.heartbeat={self.heartbeat}")
        if not self.slow > 1:
            raise ValueError(f"health.slow={self.slow} must be above 1: how many times as long as other ranks")
        if self.verify_every < 0:
            raise ValueError(f"health.verify_every={self.verify_every} must not be negative")
        for text in self.faults:
            parse(text)


@dataclass(kw_only=True, slots=True)
class TelemetryConfig:
    """What devices draw, do and hold while a run goes on (docs/health.md)."""

    every: float | None = 10.0  # seconds between two samples of each device, which the record gets; null: none
    prometheus: str | None = None  # host:port where the latest figures can be fetched, and nowhere else; null: nowhere

    def __post_init__(self) -> None:
        if self.every is not None and not self.every > 0:
            raise ValueError(f"telemetry.every={self.every} must be positive, or null")
        if self.prometheus is not None:
            split_address(self.prometheus)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of ``telemetry.prometheus``. Raises ValueError for what is none."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(
            f"telemetry.prometheus={text} must be host:port, for example 127.0.0.1:9400 (0.0.0.0:9400: whoever can "
            "reach this machine may read it)"
        )
    return host, int(port)
