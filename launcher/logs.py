"""Where the ranks of a run write: each its own files, and the first one's lines on the terminal as well.

runs/<id>/logs/rank0/stdout.log  stderr.log  heartbeat.json  record.json     the last two: training/health/beat.py
               rank1/...
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from launcher.console import Copy

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import LogsDest


def log_of(run: Path, rank: int, name: str = "stdout.log") -> Path:
    """A file that a rank writes into the run's folder."""
    return run / "logs" / f"rank{rank}" / name


@contextmanager
def copy_output(run: Path, rank: int) -> Iterator[None]:
    """While entered, a rank's lines are kept in its log as well."""
    log_of(run, rank).parent.mkdir(parents=True, exist_ok=True)
    with log_of(run, rank).open("w") as log, redirect_stdout(cast(TextIO, Copy(sys.stdout, log))):
        yield


class RankLogs:
    """Tells torch's elastic agent which files are whose; what its own ``DefaultLogsSpecs`` does, with flatter names.

    Where standard output is a terminal, rank 0 writes to it by itself (launcher/console.py keeps a copy): only so can
    it renew a line. Elsewhere the agent follows rank 0's file.
    """

    def __init__(self, run: Path, terminal: bool) -> None:
        self.run, self.terminal = run, terminal
        self.root_log_dir = str(run / "logs")

    def reify(self, envs: dict[int, dict[str, str]]) -> "LogsDest":
        """Makes a folder for each rank of ``envs``, the ranks' environments.

        No rank writes the file of its error that the agent would read: cut short by the rank's death, it would be the
        agent's own. Ranks keep records of another kind.
        """
        from torch.distributed.elastic.multiprocessing import LogsDest

        for rank in envs:
            log_of(self.run, rank).parent.mkdir(parents=True, exist_ok=True)
        out, err, errors = (
            {rank: str(log_of(self.run, rank, name)) for rank in envs}
            for name in ("stdout.log", "stderr.log", "error.json")
        )
        followed = {} if self.terminal else {0: out[0]}
        if self.terminal:
            out[0] = ""
        return LogsDest(out, err, followed, {0: err[0]}, errors, os.devnull, os.devnull)
