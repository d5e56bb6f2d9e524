"""One task a node, which starts the ranks there: ``python -m launcher.slurm.agent RANKS FOLDER``, by srun.

Becomes torchrun, which meets its like at the supervisor's store. SIGUSR2, which Slurm gives to every process of a
step, is for the ranks: torchrun would end by it while they save.
"""

import os
import signal
import sys

from launcher.network import find_source


def main() -> None:
    """Does not return."""
    ranks, run = sys.argv[1:]
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    words = [
        f"--nnodes={os.environ['SLURM_STEP_NUM_NODES']}",
        f"--nproc-per-node={ranks}",
        "--max-restarts=0",
        "--rdzv-backend=c10d",
        "--rdzv-conf=is_host=0",  # the store is there
        f"--rdzv-endpoint={address}:{port}",
        f"--rdzv-id={os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}",
        f"--local-addr={find_source(address)}",
    ]
    program = [sys.executable, "-u", "-m", "torch.distributed.run", *words, "-m", "launcher.child", run]
    os.execv(sys.executable, program)  # noqa: S606 (words, no shell)


if __name__ == "__main__":
    main()
