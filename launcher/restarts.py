"""Starts the ranks of a run, and starts them again where some have died and there is a checkpoint to go on from."""

import sys
from pathlib import Path

from launcher import agent, folder
from training.checkpoint import folders


def start(run: Path, world: int, restarts: int) -> int:
    """``agent.start``, and again after deaths, but not more than ``restarts`` times from the same checkpoint.

    What happens again and again needs somebody to look at it, and what has no checkpoint begins again soon enough.
    """
    newest, again = -1, 0
    while (code := agent.start(run, world)) == 1 and (steps := folders.find(run / folders.FOLDER)):
        again = again + 1 if steps[-1] == newest else 1
        newest = steps[-1]
        if again > restarts:
            print(f"shoestring: not started again: run.restarts={restarts}", file=sys.stderr)
            break
        print(f"shoestring: starting again from the checkpoint after step {newest} ({again} of {restarts})", flush=True)
        folder.set_aside(run, ("logs",))
    return code
