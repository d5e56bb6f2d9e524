"""``shoestring enroll``: the folder of a run, for a batch script of one's own: slurm/train.sbatch, used by hand.

    folder=$(python -m launcher.enroll run=small run.id=mine cluster=slurm ...)

The first job makes it, as `shoestring submit` does; so does one that comes later, with the words that it is given then.
A job that is requeued finds it as it is. The path alone goes to standard output.
"""

import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from configs.schema import RunConfig
from launcher import cli, folder, gate, mistakes, ranks
from launcher.invocation import Invocation
from launcher.slurm import jobs
from training.config import Resume

SUMMARY = "make the folder of a run for a batch script of your own, and print its path"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints the path of the folder; exit code 2 for a mistake in the configuration, 1 if its layout's proof failed."""
    if config.run.id is None:
        raise ValueError("run.id=null must have a value: by it the next job of this script finds the run")
    path = Path(config.run.folder).absolute() / config.run.id
    job, again = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if not again or not (path / "config.yaml").is_file():
        config = replace(config, checkpoint=replace(config.checkpoint, resume=Resume.auto))
        if found := list(mistakes.find_mistakes(config)):
            mistakes.report(found)
            return cli.MISTAKE
        with redirect_stdout(sys.stderr):
            topology = ranks.check_layout(config, None)
            try:
                folder.create(config, invocation, gate.admit(config, topology, invocation))
            except gate.UnprovedError as error:
                print(error)
                return 1
        if job is not None:
            jobs.keep(path, job, invocation.command)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["enroll", *sys.argv[1:]]))
