"""``shoestring validate``: everything about a run that can be told without starting it, and what it will take.

Composition has found missing values, wrong types and what does not go together. Here: ranks against the machines,
batches against the schedule, files that must be there, folders that must take files, packages, and the memory that a
rank's weights, gradients and optimizer's state need (training/footprint.py). `shoestring submit` asks the same before
a job goes into a queue, for what is wrong shows there after hours of waiting.
"""

import sys

from configs.schema import RunConfig
from launcher import cli
from launcher.invocation import Invocation
from launcher.layout import describe_world
from launcher.mistakes import find_mistakes, find_notes, report, weigh
from launcher.params import scale
from launcher.ranks import check_layout

SUMMARY = "check everything about a run that can be told without starting it"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints a verdict; exit code 2 and a line for each mistake if there are any."""
    if mistakes := list(find_mistakes(config)):
        report(mistakes)
        return cli.MISTAKE
    print("\n".join(describe(config)))
    return 0


def describe(config: RunConfig) -> list[str]:
    """What the run would be, in lines."""
    topology = check_layout(config, None)
    held = weigh(config, topology)
    lines = describe_world(config, topology)
    lines.append(
        f"  memory of a rank: {_write(held.weights)} weights, {_write(held.moments)} moments, "
        f"{_write(held.gradients)} gradients = {_write(held.total)}; activations come on top"
    )
    lines += [f"  note: {note}" for note in find_notes(config)]
    return [*lines, "nothing is wrong that can be told without starting"]


def _write(size: float) -> str:
    return f"{scale(size, 'PTGM')}B"


if __name__ == "__main__":
    sys.exit(cli.main(["validate", *sys.argv[1:]]))
