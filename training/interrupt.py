"""Ctrl-C: the first asks the loop to stop where it can save, the second stops at once."""

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self


class Interrupt:
    """While entered, ``asked`` says whether Ctrl-C was pressed; ``say`` is called when it is."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.asked = False
        self._say = say

    def __enter__(self) -> Self:
        # Python lets the main thread alone handle signals; elsewhere the caller's handling stays.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._before = signal.signal(signal.SIGINT, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        if self._main:
            signal.signal(signal.SIGINT, self._before)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # Python refuses to write to a stream in the middle of a write to it: then this line is lost, not the run.
        with suppress(RuntimeError):
            self._say("Ctrl-C: stopping after this micro-batch and saving; Ctrl-C again stops at once")
