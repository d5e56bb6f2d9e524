"""A thread beside a rank's work that looks at it ten times a second, and tells the others how it goes.

    what is the main thread doing? --> heartbeat.json, every few seconds
    another attempt has the run    --> end: launcher and ranks read what this rank would overwrite
    nothing new for health.hang    --> what do the heartbeats of all ranks say? --> a hang: say who, and end
    a window is over, on rank 0    --> what do they say? --> a slow rank: say who

A rank that is stuck cannot say so; the others do. Files carry it, not messages: what would carry messages may be what
hangs. All ranks see the same folder.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from parallel.doing import Activity, read
from training.checkpoint import fence
from training.health.beat import HEARTBEAT, Beat, locate, name_process, read_beat, write
from training.health.config import HealthConfig
from training.health.hang import ENDED, end_hang
from training.health.verdict import SECOND, find_slow

LOOK = 0.1  # seconds between two looks


class Pulse:
    """The heartbeat of a rank. A context manager: while entered, it beats, if heartbeats are on."""

    def __init__(self, config: HealthConfig, run: Path, rank: int, world: int) -> None:
        self._config, self._run, self._rank, self._world = config, run, rank, world
        self._fence = fence.enter(run)
        self._over, self._watched = threading.Event(), False
        self._main = threading.get_ident()
        self._doing, self._since = Activity("", False), time.time_ns()
        self._looks, self._waits, self._busy = 0, 0, -1.0
        self._say: Callable[[str], None] = print
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._config.heartbeat is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def watch(self, on: bool, say: Callable[[str], None] = print) -> None:
        """From now on the rank is to make progress, or need not. ``say`` takes lines for a person."""
        self._since, self._watched, self._say = time.time_ns(), on, say

    def _beat_on(self) -> None:
        every = self._config.heartbeat
        assert every is not None
        now = time.monotonic()
        beat, window = now, now + self._config.window
        while not self._over.wait(LOOK):
            self._look()
            if (now := time.monotonic()) >= beat:
                beat = now + every
                self._tell()
                if self._watched and time.time_ns() - self._since > self._config.hang * SECOND:
                    end_hang(self._config, self._run, self._rank, self._world, self._doing.words)
            if now >= window:
                window = now + self._config.window
                self._close_window()

    def _look(self) -> None:
        doing = read(self._main)
        if doing.words != self._doing.words:
            self._since = time.time_ns()
        self._doing = doing
        self._looks += 1
        self._waits += doing.waiting

    def _tell(self) -> None:
        if (words := self._fence.find_newer()) is not None:
            print(words, file=sys.stderr, flush=True)
            os._exit(ENDED)
        now = time.time_ns()
        mine = Beat(
            self._rank,
            *name_process(),
            now,
            self._doing.words,
            self._since,
            self._doing.waiting,
            self._watched,
            self._busy,
        )
        write(locate(self._run, self._rank, HEARTBEAT), mine)

    def _close_window(self) -> None:
        self._busy = 1 - self._waits / max(1, self._looks)
        self._looks = self._waits = 0
        self._tell()
        if self._rank == 0 and self._world > 1 and self._watched:
            found = [beat for rank in range(self._world) if (beat := read_beat(self._run, rank)) is not None]
            if len(found) == self._world and (slow := find_slow(found, self._config.slow)) is not None:
                self._say(slow.describe())
