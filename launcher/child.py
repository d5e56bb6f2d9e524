"""The program of a rank whose run's folder is there: ``python -m launcher.child FOLDER [PARENT]``.

    launcher/agent.py        started it: with PARENT, whose end is its own; it talks inside this machine alone
    srun, torchrun by srun   started it (launcher/supervise.py)

The rank prints no exception: it is kept in a file, for who started it to report first and once.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path

from launcher import cli, folder
from launcher.discover import Rank, discover
from launcher.entry import enter, keep_requests, leave, stay_inside
from launcher.logs import copy_output
from launcher.member import serve_alone, take_part
from launcher.parent import end_with
from training.checkpoint.fence import SupersededError
from training.health.beat import keep_error, read_ending


def main() -> int:
    """Trains. The exit code: 0 however the run ended, 2 for a user's mistake, 3 for a machine that is unfit, 1 for
    a fault, 130 for Ctrl-C before."""
    keep_requests()  # before there is another thread
    path, started_here = Path(sys.argv[1]), len(sys.argv) > 2
    if started_here:
        end_with(int(sys.argv[2]))
        stay_inside()
    rank = discover(os.environ)
    try:
        _serve(path, rank, started_here)
    except KeyboardInterrupt:
        return 130
    except SupersededError as error:
        print(error, file=sys.stderr)  # the folder of records is another attempt's
        return 1
    except Exception as error:
        number = 0 if rank is None else rank.rank
        if read_ending(path, number) is None:  # what happens in a run is kept there: training/health/attend.py
            keep_error(path, number, error)
        return cli.name_exit(error) if isinstance(error, ValueError) and cli.is_mistake(error) else 1
    return 0


def _serve(path: Path, rank: Rank | None, started_here: bool) -> None:
    """Where the agent of this machine started it, lines go where that has put them; else the first rank's to the job's
    output, and all to the ranks' logs.
    """
    config = folder.load_config(path)
    if rank is None:  # the job has one task
        serve_alone(config, path)
        return
    with ExitStack() as stack:
        rank = stack.enter_context(enter(rank, config.network))
        if sys.stdout.isatty() or (not started_here and rank.rank == 0):
            stack.enter_context(copy_output(path, rank.rank))
        take_part(config, rank, lambda _: path, own_log=not started_here and rank.rank > 0)


if __name__ == "__main__":
    leave(main())
