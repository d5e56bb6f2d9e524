"""What a rank tells of itself while it lives, and when it dies: small files of JSON that others read.

    logs/rank3/heartbeat.json    anew every few seconds: who, where, what it does, since when, how it has spent its time
               record.json       once, where it ends by a fault: which, and what it did last

Times are nanoseconds of the machine's clock, so that records of several machines can be put in order.
"""

import json
import os
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel.doing import read_error

HEARTBEAT, RECORD = "heartbeat.json", "record.json"


@dataclass(frozen=True, slots=True)
class Beat:
    """A rank, a moment ago."""

    rank: int
    node: str
    pid: int
    time: int  # ns
    action: str  # see parallel/doing.py
    since: int  # ns, that it has been doing so
    waiting: bool  # for other ranks
    watched: bool  # whether it is to make progress: not while text is prepared, for example
    busy: float  # share of the last window in which it computed and did not wait; -1: none is over


@dataclass(frozen=True, slots=True)
class Ending:
    """A rank's last words."""

    rank: int
    node: str
    time: int  # ns
    action: str  # that it ended in
    error: str  # "RuntimeError: ..."
    stack: str


def locate(run: Path, rank: int, name: str) -> Path:
    """A file of a rank, which other ranks and the launcher read."""
    return run / "logs" / f"rank{rank}" / name


def write(path: Path, content: Beat | Ending) -> None:
    """Whoever reads sees all of it or what was there before. A full disk is no reason to stop."""
    partial = path.with_name(f"{path.name}.partial")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(asdict(content)), encoding="utf-8")
        partial.replace(path)


def read_beat(run: Path, rank: int) -> Beat | None:
    """The last heartbeat of a rank; None where there is none that can be read."""
    try:
        return Beat(**json.loads(locate(run, rank, HEARTBEAT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def read_ending(run: Path, rank: int) -> Ending | None:
    """The last words of a rank; None where there are none."""
    try:
        return Ending(**json.loads(locate(run, rank, RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def keep_error(run: Path, rank: int, error: BaseException) -> None:
    """The record of a rank that ends by ``error``."""
    words = f"{type(error).__name__}: {error}"
    stack = "".join(traceback.format_exception(error))
    write(locate(run, rank, RECORD), _end(rank, read_error(_innermost(error)), words, stack))


def keep_words(run: Path, rank: int, action: str, words: str, stack: str) -> None:
    """The record of a rank that ends without an exception of its own."""
    write(locate(run, rank, RECORD), _end(rank, action, words, stack))


def _end(rank: int, action: str, words: str, stack: str) -> Ending:
    return Ending(rank, name_process()[0], time.time_ns(), action, words, stack)


def _innermost(error: BaseException) -> BaseException:
    """What was raised first: an error may have been raised from another one, elsewhere."""
    while error.__cause__ is not None and error.__cause__.__traceback__ is not None:
        error = error.__cause__
    return error


def name_process() -> tuple[str, int]:
    """The machine that this process is on, and its number there."""
    return socket.gethostname(), os.getpid()


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is there, but stopped by a signal."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in "Tt"


def is_sibling(pid: int) -> bool:
    """Whether a process of this machine was started by whom this one was."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        return int(text.rpartition(")")[2].split()[1]) == os.getppid()
    except (OSError, IndexError, ValueError):
        return False
