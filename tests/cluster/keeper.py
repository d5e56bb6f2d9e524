"""Keeps the daemons of a loopback cluster, and what these start, until its input ends. Then none of them is left.

It reads one line of JSON, a list of commands, and starts them. Whatever loses its parent below it becomes its own child
(PR_SET_CHILD_SUBREAPER): when its input ends, it kills its children until it has none.
"""

import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>


def end_children() -> None:
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.002)


def main() -> None:
    if ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl: PR_SET_CHILD_SUBREAPER")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel collects what has ended; children get the usual
    no_input = [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    for words in json.loads(sys.stdin.readline()):
        line = ["setpriv", "--pdeathsig", "KILL", *words]
        os.posix_spawnp(line[0], line, os.environ, file_actions=no_input, setsigdef=[signal.SIGCHLD])
    sys.stdin.read()
    end_children()


if __name__ == "__main__":
    main()
