"""``python -m launcher.evaluation RUN ...``: ``shoestring eval``, also as a rank of torchrun, srun or mpirun."""

import os
import sys

from launcher import cli
from launcher.discover import discover
from launcher.entry import leave

if __name__ == "__main__":
    code = cli.main(["eval", *sys.argv[1:]])
    if discover(os.environ) is not None:
        leave(code)
    sys.exit(code)
