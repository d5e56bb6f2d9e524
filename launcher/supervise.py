"""What a batch script runs on its first node: ``python -m launcher.supervise FOLDER``. It stays until the run is over.

    ranks start, on the job's healthy nodes      launcher/slurm/step.py
    they end by themselves      finished, or diverged: so is the job
    some die                    started again, on other nodes where theirs are lost and the job has spares
                                launcher/restarts.py says how often
    too few nodes are left      the job is put back into the queue, if cluster.requeue says so
    SIGUSR2                     the job's time is nearly over, or another one needs its nodes: ranks save, the job is
                                put back into the queue
    SIGTERM                     somebody has cancelled the job: ranks save

What becomes of the run is in the folder, ``state.json``, for ``shoestring status``. Exit code as ``shoestring train``.
"""

import signal
import sys
from pathlib import Path

ASKED = (signal.SIGUSR2, signal.SIGTERM)


def main(argv: list[str]) -> int:
    """The exit code; 2 for a user's mistake."""
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKED)  # until somebody hears them, seconds from now
    from launcher import cli, folder, restarts
    from launcher.slurm import nodes
    from launcher.supervisor import Supervisor

    try:
        run = Path(argv[0])
        supervisor = Supervisor(run, folder.load_config(run), nodes.read_job())
        folder.set_aside(run, ("logs",))  # of the attempt before
        for number in ASKED:
            signal.signal(number, supervisor.hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKED)
        try:
            code = restarts.start(run, supervisor.begin, supervisor.config.run.restarts, supervisor.job.name)
        except ValueError as error:
            supervisor.say("failed", str(error))
            raise
        return supervisor.conclude(code)
    except ValueError as error:
        if not cli.is_mistake(error):
            raise
        print(f"shoestring: {error}", file=sys.stderr)
        return cli.MISTAKE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
