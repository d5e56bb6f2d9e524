"""``shoestring checkpoint export <run> to=<folder>``: a checkpoint's weights in Hugging Face format, as a stream.

What ``shoestring export`` writes of a run's last weights, this writes of any of its checkpoints, whatever layout made
it. One tensor is in memory at a time, and every block that is read is compared with its checksum.
"""

import sys
from dataclasses import asdict, dataclass

from launcher import cli, export, folder
from launcher.checkpoint import choose
from launcher.invocation import Invocation
from training.checkpoint import folders
from training.checkpoint.facts import check_model

SUMMARY = "write the weights of a checkpoint in Hugging Face format"
ARGUMENTS = ("run",)


@dataclass(kw_only=True, slots=True)
class Config(export.Config):
    """Which, and where to."""

    step: int | None = None  # that the checkpoint was made after; null: the newest
    ema: bool = False  # the moving average of the weights (optimizer.ema) in their place


def run(config: Config, invocation: Invocation) -> int:
    """Writes ``config.json``, the safetensors files and their index to ``config.to``."""
    found = folder.open(invocation.arguments[0], config.folder)
    root = folder.find_checkpoints(found.path)
    place = folders.locate(root, choose(config.step, root)[-1])
    manifest, trained = folders.read_manifest(place), folder.load_config(found.path)
    check_model(manifest, asdict(trained.model), str(place), f"{found.path / 'config.yaml'} is of another model")
    # Loads torch: only once the checkpoint is known to be there.
    from training.checkpoint.weights import open_weights

    export.write(open_weights(place, manifest, trained.model, config.ema), trained, config)
    print(f"{place} is in {config.to}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["checkpoint", "export", *sys.argv[1:]]))
