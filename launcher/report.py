"""What is said when ranks died: which was the first, its last lines, its exception; then what the others did.

The first is not the one that was seen first: ranks that lose a connection to a dead one die of that, often earlier
than the dead one is noticed, and the agent may end a rank that is just about to leave. So, in this order:

    a lost machine                 with all ranks on it: only whoever started them knows (launcher/supervisor.py)
    a mistake of the user's        a rank that found one ended with exit code 2
    an exception of a rank's own   the earliest
    death without a word           a signal, or an exit in the middle
    a lost connection              the earliest
    SIGTERM, SIGUSR2               with these those that live on are told to end
"""

import json
import re
import signal
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from pathlib import Path

from launcher.logs import log_of
from training.checkpoint.place import replace_text
from training.health.beat import read_beat, read_ending
from training.interrupt import LAUNCHER

VERDICT = "verdict.json"
LAST = 15  # lines of a rank's output shown
LOST = re.compile(r"gloo|nccl|Connection (closed|reset|refused)|Broken pipe|^Dist\w*Error", re.IGNORECASE)
HANG = "HangError: "  # training/health/pulse.py
MISTAKE, UNFIT = 2, 3  # a rank's exit codes for a mistake of the user, and for a machine that is unfit


class Cause(IntEnum):
    """What a rank died of; smaller is nearer to the root."""

    node = -1  # which is lost, with all ranks on it
    mistake = 0
    exception = 1
    silence = 2
    connection = 3
    ended = 4


@dataclass(frozen=True, slots=True)
class Verdict:
    """What ended an attempt, as data: ``logs/verdict.json``."""

    rank: int
    node: str  # "" where it is not known
    cause: str  # the name of a ``Cause``
    error: str  # "ValueError: ...", or ""
    words: str  # for a person


@dataclass(frozen=True, slots=True)
class Death:
    """How a rank ended."""

    rank: int
    code: int | None  # exit code, negative for a signal; None: not known
    message: str  # "ValueError: ...", or empty
    trace: str  # its traceback, or empty
    time: float  # when the exception was kept
    action: str = ""  # what it did last, where that is known
    node: str = ""  # its machine, where that is known
    lost: bool = False  # the machine, with all that was on it

    @property
    def cause(self) -> Cause:
        """What it died of."""
        if self.lost:
            return Cause.node
        if self.message and self.code in (MISTAKE, UNFIT):
            return Cause.mistake
        if self.message:
            return Cause.connection if LOST.search(self.message) else Cause.exception
        return Cause.ended if self.code in (-signal.SIGTERM, -LAUNCHER) else Cause.silence

    @property
    def brief(self) -> str:
        """The same in words, behind "rank 3"."""
        return self._brief + (f" in {self.action}" if self.action else "")

    @property
    def _brief(self) -> str:
        if self.lost:
            return "was lost with its node, of which nothing is heard any more"
        if self.cause is Cause.connection:
            return "lost its connection"
        if self.message.startswith(HANG):
            return f"found that {self.message.removeprefix(HANG)}; it was itself"
        if self.message:
            return f"raised {self.message.splitlines()[0]}"
        if self.code is None:
            return "ended without a word"
        if self.code >= 0:
            return f"ended with exit code {self.code} and no exception"
        return f"was ended by {signal.Signals(-self.code).name}"


def read_deaths(run: Path, codes: Mapping[int, int | None]) -> list[Death]:
    """How the ranks of ``codes`` ended, the root of it first: ``codes`` are exit codes by rank."""
    return sorted((_read(run, rank, code) for rank, code in codes.items()), key=lambda death: (death.cause, death.time))


def lose(deaths: list[Death], ranks: Collection[int], node: str) -> list[Death]:
    """``deaths`` where ``node`` is lost, and ``ranks`` with it: that is the root of all others."""
    known = [replace(death, lost=True, node=node) if death.rank in ranks else death for death in deaths]
    return sorted(known, key=lambda death: death.cause)


def mistake(deaths: list[Death]) -> str | None:
    """What the user is to be told if a mistake of theirs was the root."""
    return deaths[0].message.partition(": ")[2] if deaths[0].cause is Cause.mistake else None


def describe(run: Path, deaths: list[Death]) -> str:
    """The report."""
    first, *others = deaths
    names = _name(deaths)
    lines = [f"shoestring: {names[first.rank]} {first.brief}"]
    shown = (
        [log_of(run, first.rank)] if first.trace else [log_of(run, first.rank), log_of(run, first.rank, "stderr.log")]
    )
    for path in shown:
        tail = path.read_text(errors="replace").splitlines()[-LAST:] if path.exists() else []
        lines += [f"--- the end of {path}", *tail] if tail else []
    if first.trace:
        lines += ["--- its exception", first.trace.rstrip()]
    lines += ["---", *(f"then {names[death.rank]} {death.brief}" for death in others)]
    return "\n".join([*lines, f"every rank's output is in {run / 'logs'}"])


def _name(deaths: list[Death]) -> dict[int, str]:
    """Ranks in words; with their machines, where there are several."""
    several = len({death.node for death in deaths}) > 1
    return {death.rank: f"rank {death.rank}" + f" on {death.node}" * (several and bool(death.node)) for death in deaths}


def keep_verdict(run: Path, deaths: list[Death]) -> None:
    """Writes down the root of it all, for whoever decides what comes next."""
    first = deaths[0]
    words = f"{_name(deaths)[first.rank]} {first.brief}"
    verdict = Verdict(first.rank, first.node, first.cause.name, first.message.partition("\n")[0], words)
    replace_text(run / "logs" / VERDICT, json.dumps(asdict(verdict)) + "\n")


def read_verdict(run: Path) -> Verdict | None:
    """Of the ranks that died last; None where there is none."""
    try:
        return Verdict(**json.loads((run / "logs" / VERDICT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep_traces(run: Path, deaths: list[Death]) -> None:
    """Adds each rank's traceback to its own log, where it would be had the rank been alone."""
    for death in deaths:
        with log_of(run, death.rank, "stderr.log").open("a") as log:
            log.write(death.trace)


def _read(run: Path, rank: int, code: int | None) -> Death:
    """From what the rank says in its last words; else from its last heartbeat."""
    if (ending := read_ending(run, rank)) is not None:
        return Death(rank, code, ending.error, ending.stack, ending.time / 1e9, ending.action, ending.node)
    beat = read_beat(run, rank)
    action, node = (beat.action, beat.node) if beat is not None else ("", "")
    return Death(rank, code, "", "", 0.0, action, node)
