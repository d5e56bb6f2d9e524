"""``shoestring train``: a run from its configuration to its summary, in this process."""

import shutil
import sys

from configs.schema import RunConfig
from launcher import cli, folder
from launcher.invocation import Invocation

SUMMARY = "train a model: prepare the text, run the steps, save weights, metrics and a sample"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Trains in a new run folder. Exit code 0; 130 after Ctrl-C; 1 if loss or gradient were not finite for too long."""
    path = folder.create(config, invocation)
    print(f"run {path}", flush=True)
    # Loads torch: only once the configuration is known to be good.
    from training.finish import Ending
    from training.loop import train

    try:
        summary = train(config, path, config.cluster.price_per_device_hour)
    except BaseException:
        record = path / "metrics.jsonl"
        if not record.exists() or not record.stat().st_size:
            # It never started: its id is free for the next try.
            shutil.rmtree(path)
        raise
    return {Ending.finished: 0, Ending.interrupted: 130, Ending.diverged: 1}[summary.ending]


if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
