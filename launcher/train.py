"""``shoestring train``: a run from its configuration to its summary, in this process."""

import sys

from configs.schema import RunConfig
from launcher import cli, folder
from launcher.invocation import Invocation

SUMMARY = "train a model: prepare the text, run the steps, save weights, metrics and a sample"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Trains in a new run folder. Exit code 0; 130 after Ctrl-C; 1 if the loss stayed infinite."""
    path = folder.create(config, invocation)
    print(f"run {path}", flush=True)
    # Loads torch: only once the configuration is known to be good.
    from training.finish import Ending
    from training.loop import train

    summary = train(config, path, config.cluster.price_per_device_hour)
    return {Ending.finished: 0, Ending.interrupted: 130, Ending.diverged: 1}[summary.ending]


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
