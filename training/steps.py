"""The steps of a run, one after the other, with an evaluation now and then and after the last one."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from training.agree import any_rank
from training.evaluate import evaluate
from training.finish import Ending, Outcome
from training.metrics import Record
from training.profile import Profile
from training.setup import Setup
from training.step import run_step
from training.view import View


def run_steps(setup: Setup, record: Record, view: View, asked: Callable[[], bool], folder: Path) -> Outcome:
    """Takes every step of the run, or as many as it can before it is ``asked`` to stop. ``folder`` is the run's."""
    run, limit = setup.config.run, setup.config.optimizer.skip_limit
    row, held_out, skipped, profile = None, math.nan, 0, Profile(setup, folder, view.note)
    # Several ranks agree between steps; one has nobody to agree with and stops between micro-batches.
    stop = asked if setup.mesh.topology.world == 1 else _never
    for step in range(run.steps):
        stopped = any_rank(setup.mesh, asked())
        with nullcontext() if stopped else profile.around(step):
            done = None if stopped else run_step(setup, step, stop)
        if done is None:
            profile.close()
            return Outcome(Ending.interrupted, row, held_out)
        row = done
        record.write_step(row)
        view.show(row)
        skipped = skipped + 1 if row.skipped else 0
        if skipped > limit:
            profile.close()
            return Outcome(Ending.diverged, row, held_out)
        if step + 1 == run.steps or (run.eval_every and (step + 1) % run.eval_every == 0):
            held_out = evaluate(setup)
            record.write("eval", step=step, loss=held_out)
            view.note(f"step {step + 1}  held-out loss {held_out:.4f}")
    return Outcome(Ending.finished, row, held_out)


def _never() -> bool:
    return False
