"""Attempts at a run: a newer one shuts out those before it, which may live on where nobody sees them.

A machine that is cut off from its cluster goes on computing, and still reaches the run's folder, while the run has been
started again elsewhere. Whoever starts ranks claims the run first: those of an older claim end, and write nothing more.

    claim("123.1.0")     the file ``attempt`` in the run's folder says who may write
    Fence.check()        of ranks that began under another claim: raises, before anything is written that lasts
    Fence.find_newer()   says so: a rank's heartbeat asks, and ends the rank
"""

import os
import socket
import time
from pathlib import Path
from typing import NamedTuple

from training.checkpoint.place import replace_text

FILE = "attempt"
VARIABLE = "SHOESTRING_ATTEMPT"  # where whoever starts ranks tells them which attempt they are of


class SupersededError(RuntimeError):
    """The run has been started again since: this attempt at it must not write."""


def name_attempt() -> str:
    """What no other attempt is called."""
    return f"{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"


def claim(run: Path, attempt: str) -> None:
    """From now on the run is ``attempt``'s, which no other is called."""
    replace_text(run / FILE, attempt)


def read(run: Path) -> str:
    """Whose the run is; "" where nobody has claimed it."""
    try:
        return (run / FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


class Fence(NamedTuple):
    """The attempt that this process is of."""

    run: Path
    attempt: str

    def check(self) -> None:
        """Raises SupersededError where the run is another attempt's."""
        if (owner := read(self.run)) != self.attempt:
            raise SupersededError(self._describe(owner))

    def find_newer(self) -> str | None:
        """The same in words, where another attempt has claimed the run; None also where no file can be read."""
        try:
            owner = read(self.run)
        except OSError:
            return None
        return self._describe(owner) if owner not in ("", self.attempt) else None

    def _describe(self, owner: str) -> str:
        return f"{self.run} has been started again since, as {owner}: this attempt, {self.attempt}, writes nothing more"


def enter(run: Path) -> Fence:
    """Of this process: the attempt that its environment names, or else whose the run is now."""
    return Fence(run, os.environ.get(VARIABLE) or read(run))
