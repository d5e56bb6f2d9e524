"""``shoestring checkpoint import <folder> run=... run.id=...``: published weights become a run's first checkpoint.

The run has taken no step. ``shoestring train run=... run.id=... checkpoint.resume=auto`` begins it, in any layout: each
rank reads its part. The keys are those of ``train``, of which ``model`` and ``precision`` matter here.
"""

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from configs.schema import RunConfig
from launcher import cli, folder
from launcher.invocation import Invocation
from training.checkpoint import folders
from training.config import Resume

SUMMARY = "make a run's first checkpoint of weights in Hugging Face format"
ARGUMENTS = ("folder",)


def run(config: RunConfig, invocation: Invocation) -> int:
    """Makes a run folder with a checkpoint after step 0; it goes again where that cannot be completed."""
    (published,) = invocation.arguments
    config.checkpoint.resume = Resume.never  # nothing is written into a run that is there
    path = folder.create(config, invocation)
    place = folders.locate(folder.find_checkpoints(path), 0)
    try:
        # Loads torch: only once the configuration is known to be good.
        from training.checkpoint.first import admit

        size = admit(config, Path(published), place)
    except BaseException as error:
        folders.discard(place)
        folder.discard_unstarted(path)
        if isinstance(error, OSError):
            raise ValueError(f"{published} cannot be imported: {error}") from error
        raise
    words = [word for word in invocation.overrides if not word.startswith(("run.id=", "checkpoint.resume="))]
    words += [f"run.id={path.name}", "checkpoint.resume=auto"]
    begin = replace(invocation, verb="train", arguments=(), overrides=tuple(words))
    print(f"{published} is in {place}, {size / 1e6:,.1f} MB")
    print(f"it begins with: {shlex.join(begin.command)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["checkpoint", "import", *sys.argv[1:]]))
