"""The program of a rank that launcher/agent.py started: ``python -m launcher.child FOLDER PARENT``.

The run's folder is there and holds the configuration. The rank ends when its parent does, talks inside this machine
only, and prints no exception: it is kept in the file that the agent named, for the agent to report first and once.
"""

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TextIO, cast

from launcher import cli, folder, ranks
from launcher.console import Copy
from launcher.logs import log_of
from launcher.member import take_part


def main() -> int:
    """Trains. The exit code: 0 however the run ended, 2 for a user's mistake, 1 for a fault, 130 for Ctrl-C before."""
    path, parent = Path(sys.argv[1]), int(sys.argv[2])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        return _serve(path)
    except KeyboardInterrupt:
        return 130


def _serve(path: Path) -> int:
    rank = ranks.discover(os.environ)
    assert rank is not None
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ[variable] = ranks.LOOPBACK
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        with ExitStack() as stack:
            if sys.stdout.isatty():
                log = stack.enter_context(log_of(path, rank.rank).open("w"))
                stack.enter_context(redirect_stdout(cast(TextIO, Copy(sys.stdout, log))))
            record(take_part)(folder.load_config(path), rank, lambda _: path)
    except ValueError as error:
        return 2 if cli.is_mistake(error) else 1
    except Exception:
        return 1
    return 0


def _end_with(parent: int) -> None:
    """Ends this rank, and what it started, when the process that started it is gone without a word."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(os.getpgid(0), signal.SIGKILL)  # every rank leads a group of its own


if __name__ == "__main__":
    sys.exit(main())
