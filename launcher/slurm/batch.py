"""What is handed to Slurm for one run, or for several as an array: the script, and the folder it is kept in."""

import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from configs.schema import RunConfig
from launcher.preflight.unfit import read_excluded
from launcher.slurm import script

ABOUT = (
    "# Written by `shoestring submit` from slurm/train.sbatch. config.yaml and command.txt beside it say what trains;",
    "# this job reads them, and so does each that comes after it.",
)


class Batch(NamedTuple):
    """What is handed to Slurm."""

    text: str  # of the script
    options: tuple[str, ...]  # that it sets
    place: Path  # the folder it is kept in


def write(configs: list[RunConfig], place: Path) -> Batch:
    """The script of a job that is kept in ``place``, an absolute path in it. Nodes that an earlier one of the same run
    has found unfit are left out.
    """
    config, array, here = configs[0], len(configs) > 1, place.absolute()
    output = script.write_pattern(here, "%a/job-%j.out" if array else "job-%j.out")
    without = [*filter(None, [config.cluster.exclude]), *sorted(read_excluded(place))]
    cluster = replace(config.cluster, exclude=",".join(without) or None)
    options = script.list_options(cluster, place.name, output, len(configs))
    python = config.cluster.python
    # What this process found beside it, in the folder it was started from, the nodes find there too.
    words = [python or sys.executable, *([] if {"", os.getcwd()} & set(sys.path) else ["-P"])]
    blocks = {
        "about": ABOUT,
        "options": script.write_options(options),
        "setup": config.cluster.setup,
        "run": script.write_run(here, words, Path.cwd(), array),
    }
    text = script.render(blocks, script.TEMPLATE.read_text(encoding="utf-8"))
    return Batch(text, tuple(options), place)


def name_array(config: RunConfig) -> Path:
    """The folder of an array that is submitted now."""
    return Path(config.run.folder) / f"{config.run.name}-{datetime.now():%Y%m%d-%H%M%S}-array"


def link(place: Path, runs: list[Path]) -> Path:
    """Makes the folder of an array: links to ``runs``, named by element."""
    place.mkdir()
    for element, run in enumerate(runs):
        (place / str(element)).symlink_to(os.path.relpath(run, place))
    return place
