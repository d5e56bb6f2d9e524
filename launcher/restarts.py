"""Starts the ranks of a run, and starts them again where some have died after a step or more."""

import json
import sys
from pathlib import Path

from launcher import agent, folder
from training.checkpoint import folders, near
from training.checkpoint.place import Place


def start(run: Path, world: int, restarts: int) -> int:
    """``agent.start``, and again after deaths, but not more than ``restarts`` times from the same checkpoint or near
    copies, or from the beginning: what happens again and again needs somebody to look at it. So does what happens
    before a step is taken.
    """
    newest, again, root = -1, 0, folder.find_checkpoints(run)
    while (code := agent.start(run, world)) == 1 and has_begun(run, root):
        found = find_newest(run, root)
        again = again + 1 if found == newest else 1
        newest = found
        if again > restarts:
            print(f"shoestring: not started again: run.restarts={restarts}", file=sys.stderr)
            break
        kind = "checkpoint" if newest in folders.find(root) else "near copies"
        where = f"the {kind} after step {newest}" if newest else "the beginning"
        copies = near.find_newest(near.name_run(folder.load_config(run), run))
        where += f", or from near copies after step {copies} at most" if copies > newest else ""
        print(f"shoestring: starting again from {where} ({again} of {restarts})", flush=True)
        folder.set_aside(run, ("logs",))
    return code


def find_newest(run: Path, root: Place) -> int:
    """The step that the run is known to go on after: that of its newest checkpoint in ``root``, or of what it went on
    from last, which may have been newer near copies.
    """
    record = folder.RunFolder(run).metrics
    lines = record.read_text(encoding="utf-8").splitlines(keepends=True) if record.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    resumed = [row["step"] for row in rows if row["kind"] == "resume"][-1:]
    return max([0, *folders.find(root)[-1:], *resumed])


def has_begun(run: Path, root: Place) -> bool:
    """Whether the record has a step, or there is a checkpoint in ``root``."""
    record = folder.RunFolder(run).metrics
    steps = record.exists() and '"kind": "step"' in record.read_text(encoding="utf-8")
    return steps or bool(folders.find(root))
