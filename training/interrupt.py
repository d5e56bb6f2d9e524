"""Requests to stop: the first asks the loop to stop where it can save; a second Ctrl-C stops at once.

SIGINT     Ctrl-C
SIGUSR2    from a launcher: the time of an allocation is nearly over, or something else needs its machines
"""

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self

LAUNCHER = signal.SIGUSR2
SAID = {
    signal.SIGINT: "Ctrl-C: stopping after this micro-batch and saving; Ctrl-C again stops at once",
    LAUNCHER: "the launcher asks to stop: stopping after this step and saving",
}


class Interrupt:
    """While entered, ``asked`` says whether a stop was asked for; ``say`` is called when it is.

    Whoever starts ranks blocks SIGUSR2 in them, so that one that comes earlier is kept until it is heard here. One that
    comes later is ignored there: threads that were started meanwhile do not block it, and it would end the process.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = False
        self._say = say

    def __enter__(self) -> Self:
        # Python lets the main thread alone handle signals; elsewhere the caller's handling stays.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = {number: signal.signal(number, self._catch) for number in SAID}
            self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [LAUNCHER])
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            if LAUNCHER in self._mask:
                self._before[LAUNCHER] = signal.SIG_IGN
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.asked = True
        # Python refuses to write to a stream in the middle of a write to it: then this line is lost, not the run.
        with suppress(RuntimeError):
            self._say(SAID[signal.Signals(number)])
