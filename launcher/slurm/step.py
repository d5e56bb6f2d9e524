"""Ranks as a step of a job, that is under way: where they meet, what they are told, and how they end."""

import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from launcher.network import find_address, listen
from launcher.slurm.srun import Outcome, has_ended_badly, read_lines
from training.checkpoint.fence import VARIABLE

PATIENCE = 20.0  # seconds


class Step:
    """A step, under way since it was made."""

    def __init__(self, command: Sequence[str], others: Sequence[str], attempt: str) -> None:
        """``others``: nodes that are to reach this one, where the ranks meet."""
        self._store = listen(find_address(others))  # kept as long as the step
        address = {"MASTER_ADDR": self._store.host, "MASTER_PORT": str(self._store.port)}
        environment = {**os.environ, **address, VARIABLE: attempt, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        self._lines: list[str] = []
        self._process = subprocess.Popen(  # noqa: S603 (words, no shell)
            command, env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, number: int) -> None:
        """Passes a signal on to every rank."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def wait(self, look: Callable[[], bool], end: Callable[[], None]) -> Outcome:
        """How it ended. Once a rank has ended badly, or ``look``, asked every second, says that one must have, others
        have ``PATIENCE`` seconds to say what they know of it; then ``end`` is to end all by force, and has as long.
        """
        forced: list[float] = []  # when srun is to be pressed: first through Slurm, then itself
        while True:
            try:
                code = self._process.wait(1.0)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            if not forced and (has_ended_badly(self._lines) or look()):
                forced = [now + PATIENCE, now + 2 * PATIENCE]
            if forced and now >= forced[0]:
                (end if len(forced) == 2 else self._process.kill)()
                forced = forced[1:] or [math.inf]
        self._reader.join(5.0)
        return Outcome(code, *read_lines(self._lines))

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.rstrip("\n"))
            sys.stderr.write(line)
            sys.stderr.flush()
