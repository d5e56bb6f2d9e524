"""The steps of a run, one after the other, with an evaluation now and then and after the last one."""

import math
from collections.abc import Callable
from contextlib import nullcontext

from training.agree import agree
from training.checkpoint.state import Progress
from training.evaluate import evaluate
from training.finish import Ending, Outcome
from training.metrics import StepRow
from training.setup import Setup
from training.step import run_step
from training.watchers import Watchers


def run_steps(setup: Setup, progress: Progress, watchers: Watchers) -> Outcome:
    """Takes every step of the run from ``progress`` on, or as many as it can before it is asked to stop.

    ``progress`` goes along.
    """
    run, limit = setup.config.run, setup.config.optimizer.skip_limit
    record, view, gauge, interrupt, keeper, profile, fingerprints, neighbour, ledger = watchers
    row, held_out = None, math.nan
    ledger.switch("other")
    # Several ranks agree between steps; one has nobody to agree with and stops between micro-batches.
    stop = (lambda: interrupt.asked) if setup.mesh.topology.world == 1 else _never
    for step in range(progress.step, run.steps):
        signs = agree(setup.mesh, keeper.signs(interrupt.asked))
        keeper.follow(signs)
        with nullcontext() if signs.asked else profile.around(step), ledger.during(ledger.stepping(step)):
            done = None if signs.asked else _take_step(setup, step, stop, watchers)
        if done is None:
            profile.close()
            return Outcome(Ending.interrupted, progress.step, row, held_out)
        row = done
        record.write_step(row)
        ledger.take(step)
        view.show(row)
        progress.step, progress.seconds = step + 1, gauge.elapsed()
        progress.skipped = progress.skipped + 1 if row.skipped else 0
        if progress.skipped > limit:
            profile.close()
            return Outcome(Ending.diverged, progress.step, row, held_out)
        fingerprints.take(step + 1)
        last, best = step + 1 == run.steps, False
        if last or (run.eval_every and (step + 1) % run.eval_every == 0):
            with ledger.during("evaluation"):
                held_out = evaluate(setup)
            record.write("eval", step=step, loss=held_out)
            view.note(f"step {step + 1}  held-out loss {held_out:.4f}")
            best = keeper.is_best(progress, held_out)
        with ledger.during("checkpoints"):
            if best or (not last and keeper.is_due(step + 1, signs)):
                keeper.save(progress)  # behind the evaluation: a run that goes on from here has its row
            if not last:
                neighbour.save(progress)
    return Outcome(Ending.finished, progress.step, row, held_out)


def _take_step(setup: Setup, step: int, stop: Callable[[], bool], watchers: Watchers) -> StepRow | None:
    """A step; one whose loss or gradient is not finite a second time. Data that do this do it again, a machine that
    was wrong once does not, and then nothing is lost.
    """

    def prepare() -> None:
        with watchers.ledger.during("checkpoints"):
            watchers.keeper.hold()
            watchers.neighbour.hold()
        watchers.fingerprints.verify()

    row = run_step(setup, step, stop, prepare)
    if row is None or not row.skipped:
        return row
    again = run_step(setup, step, stop)
    if again is not None and not again.skipped:
        watchers.record.write("retry", step=step)
        watchers.view.note(
            f"step {step + 1}: loss or gradient were not finite, and are now that it was taken again: some machine was "
            "wrong, not the data"
        )
    return again


def _never() -> bool:
    return False
