"""Starts the ranks of a run on this machine and stays until the last has ended, by torch's elastic launch API.

    this process --- rank 0 (launcher/child.py)      its lines are this terminal's
       a store   --- rank 1                           on 127.0.0.1, at a port that the system chose

Each rank leads a process group of its own, so Ctrl-C reaches this process alone: it passes the signal on once, and
waits while the ranks save. When a rank dies the others are ended. When this process dies they end by themselves.
"""

import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from launcher import folder, report
from launcher.logs import RankLogs
from launcher.network import HERE, listen

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
PATIENCE = 3600  # seconds that ranks have to save after Ctrl-C; a second one ends them at once


def start(run: Path, world: int) -> int:
    """Trains on ``world`` ranks with the configuration kept in ``run``; returns when the last one has ended.

    The exit code: 0 if the run came to its end, whichever; 1 if ranks died, after a report; 128 + a signal but Ctrl-C.
    Raises ValueError for a user's mistake that a rank found, KeyboardInterrupt if Ctrl-C came before there was a run.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, launch_agent

    terminal = sys.stdout.isatty()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # the agent writes rank 0's lines, and flushes none
    store = listen(HERE)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        run_id=run.name,
        role="",
        rdzv_backend="static",
        rdzv_endpoint=f"{HERE}:{store.port}",
        rdzv_configs={"rank": 0},
        local_addr=HERE,
        max_restarts=0,
        log_line_prefix_template="${role_name}",  # nothing: with no template at all, the agent invents one
        logs_specs=cast(Any, RankLogs(run, terminal)),
        signals_to_handle=",".join(_heard()),
        shutdown_timeout=PATIENCE,
    )
    try:
        with _quiet(), _own_handlers():
            launch_agent(config, sys.executable, _words(run))
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        return _report(run, report.read_deaths(run, codes), terminal)
    except SignalException as error:
        deaths = [death for death in report.read_deaths(run, dict.fromkeys(range(world))) if death.message]
        if deaths:
            return _report(run, deaths, terminal)
        if error.sigval is not signal.SIGINT:
            return 128 + error.sigval
        if folder.RunFolder(run).ending is None:
            raise KeyboardInterrupt from None
    return 0


def _words(run: Path) -> list[str]:
    """The interpreter's arguments. A folder that this process cannot import from, its ranks cannot either."""
    safe = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
    return [*safe, "-u", "-m", "launcher.child", str(run).replace("$", "$$"), str(os.getpid())]


def _report(run: Path, deaths: list[report.Death], terminal: bool) -> int:
    """Says what went wrong; the exit code. Raises ValueError if it was a mistake."""
    if terminal:
        print("\x1b[?25h", flush=True)  # a progress bar hid the cursor, and its line is open
    if (mistake := report.mistake(deaths)) is not None:
        from launcher.preflight.unfit import UnfitError

        raise (UnfitError if deaths[0].code == report.UNFIT else ValueError)(mistake) from None
    report.keep_verdict(run, deaths)
    report.keep_traces(run, deaths)
    print(report.describe(run, deaths), file=sys.stderr)
    return 1


def _heard() -> list[str]:
    """The signals to pass on: not those that this process was started to ignore, as nohup does with SIGHUP."""
    return [name for name in SIGNALS if signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN]


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Puts signals back as they were: the agent leaves its own handlers behind."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the agent's log off the terminal: what happened is said once, in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
