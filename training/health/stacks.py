"""Where all threads of this process are, in words, while they go on."""

import faulthandler
import re
import tempfile
import threading

THREAD = re.compile(r"hread 0x([0-9a-f]+)[^\n]*\n((?:  .*\n?)*)")  # as faulthandler writes its stack


def show_stacks() -> str:
    """Of all threads of this process, the main one first."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)  # which makes no objects of the frames of threads that go on
        file.seek(0)
        shown = [(int(number, 16), frames) for number, frames in THREAD.findall(file.read())]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    shown.sort(key=lambda each: names.get(each[0]) != "MainThread")
    return "\n".join(
        f"thread {names.get(ident, ident)}, the innermost first:\n{frames}"
        for ident, frames in shown
        if names.get(ident) != "heartbeat"
    )
