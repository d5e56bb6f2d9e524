"""A rank ends with the process that started it, also where that was killed."""

import os
import signal
import threading
import time


def end_with(parent: int) -> None:
    """From now on this process, and what it has started, ends when process ``parent`` does."""
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # every rank leads a group of its own
