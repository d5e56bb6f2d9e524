"""Ends a run that hangs, with a report of what every rank was doing."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from training.health import collectives
from training.health.beat import is_sibling, is_stopped, keep_words, name_process, read_beat, read_ending
from training.health.config import HealthConfig
from training.health.stacks import show_stacks
from training.health.verdict import Hang, find_hang

REPORT = "hang.txt"  # in a run's logs/
ENDED = 1  # exit code


def end_hang(config: HealthConfig, run: Path, rank: int, world: int, action: str) -> None:
    """This ``rank`` of ``world`` is at ``action`` for long. Returns if some other rank goes on; else ends the process.

    Every rank that can does the same, and leaves its stacks. One of them writes the report; one that is stopped, and a
    child of the same process, is killed, for it would not hear that it is to end.
    """
    every = config.heartbeat
    assert every is not None
    beats = {other: read_beat(run, other) for other in range(world)}
    node, _ = name_process()
    here = {other: beat.pid for other, beat in beats.items() if beat is not None and beat.node == node}
    stopped = {other: pid for other, pid in here.items() if is_sibling(pid) and is_stopped(pid)}
    hang = find_hang(beats, time.time_ns(), config.hang, every, stopped)
    if hang is None:
        return
    error = f"HangError: {hang.describe()}"
    keep_words(run, rank, action, error, show_stacks())
    collectives.keep(run, rank)
    time.sleep(2 * every)  # the others find out too
    report = run / "logs" / REPORT
    said = "\n".join((*hang.lines, f"stacks of all ranks: {report}"))
    with suppress(OSError), report.open("x", encoding="utf-8") as file:
        file.write(_write_report(hang, run, world))
        print(said, file=sys.stderr, flush=True)
    keep_words(run, rank, action, error, said)
    for pid in stopped.values():
        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os._exit(ENDED)


def _write_report(hang: Hang, run: Path, world: int) -> str:
    parts = ["\n".join(hang.lines)]
    if missing := collectives.find_missing({rank: collectives.read_kept(run, rank) for rank in range(world)}):
        parts.append("\n".join(missing))
    for rank in range(world):
        ending = read_ending(run, rank)
        parts.append(f"rank {rank}\n{ending.stack if ending else 'has left no stack'}")
    return "\n\n".join(parts) + "\n"
