"""Starts the ranks of a run, and starts them again where some have died after a step or more."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from launcher import folder, report
from training.checkpoint import fence, folders, near
from training.checkpoint.place import Place

LOOP = 3  # times that the same rank may raise the same, without a step between them
DIED, LOST = 1, 4  # exit codes of an attempt: ranks died; a machine did, and there is another one


def start(run: Path, begin: Callable[[str], int], restarts: int, attempt: str) -> int:
    """``begin``, which is told which attempt it is, and again after deaths; the exit code of the last one.

    Not more than ``restarts`` times from the same checkpoint or near copies, or from the beginning, and not where a
    rank has raised the same ``LOOP`` times over: what happens again and again needs somebody to look at it. So does
    what happens before a step is taken. ``attempt``: what all of these are called, with a number, and no others.
    """
    newest, again, root, number = -1, 0, folder.find_checkpoints(run), 0
    raised: list[tuple[int, str]] = []
    while (code := begin(_claim(run, attempt, number))) == LOST or (code == DIED and has_begun(run, root)):
        if (owner := fence.read(run)) != f"{attempt}.{number}":
            print(f"shoestring: not started again: the run has been, as {owner}", file=sys.stderr)
            break
        found, number = find_newest(run, root), number + 1
        if found != newest:
            newest, again, raised = found, 0, []
        again += code == DIED
        verdict = report.read_verdict(run)
        if verdict is not None and verdict.error:
            raised.append((verdict.rank, verdict.error))
            if raised.count(raised[-1]) >= LOOP:
                print(f"shoestring: not started again: {verdict.words}, {LOOP} times over", file=sys.stderr)
                break
        if again > restarts:
            print(f"shoestring: not started again: run.restarts={restarts}", file=sys.stderr)
            break
        count = f" ({again} of {restarts})" * (code == DIED)
        print(f"shoestring: starting again from {_describe(run, root, newest)}{count}", flush=True)
        folder.set_aside(run, ("logs",))
    return code


def _claim(run: Path, attempt: str, number: int) -> str:
    name = f"{attempt}.{number}"
    fence.claim(run, name)
    return name


def _describe(run: Path, root: Place, newest: int) -> str:
    """What the run will go on from."""
    kind = "checkpoint" if newest in folders.find(root) else "near copies"
    where = f"the {kind} after step {newest}" if newest else "the beginning"
    copies = near.find_newest(near.name_run(folder.load_config(run), run))
    return where + (f", or from near copies after step {copies} at most" if copies > newest else "")


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
