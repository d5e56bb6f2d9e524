"""A training run from its configuration to its summary: the file to read first.

    set_up       text -> token files; the model; the optimizer, which takes its parameters over    training/setup.py
    run_steps    one step after the other, each a row of the record                               training/step.py
                 now and then, and after the last one: the loss on held-out text                  training/evaluate.py
    save         the weights                                                                      training/save.py
    finish       a bigram model's loss, a sample of text, where everything is                     training/finish.py

Ctrl-C, and losses that are not finite for too long, end the steps early; what there is, is saved all the same.
"""

import math
from pathlib import Path

from configs.schema import TrainConfig
from training.evaluate import evaluate
from training.finish import Ending, Outcome, Summary, finish
from training.interrupt import Interrupt
from training.metrics import Record
from training.save import save
from training.setup import Setup, set_up
from training.sinks import open_sinks
from training.step import run_step
from training.view import Gauge, View, open_view


def train(config: TrainConfig, folder: Path, price_per_device_hour: float = 0.0) -> Summary:
    """Trains as ``config`` says; ``folder`` exists and gets ``metrics.jsonl``, ``weights/`` and ``sample.txt``.

    Raises ValueError for mistakes in the configuration that only show here: see ``set_up`` and ``open_sinks``.
    """
    with Record(folder / "metrics.jsonl", open_sinks(config.run.sinks, folder)) as record:
        setup = set_up(config, report=print)
        record.write("start", **setup.facts)
        gauge = Gauge(config, setup.schedule, str(setup.facts["device"]), price_per_device_hour)
        with open_view(gauge) as view, Interrupt(view.note) as interrupt:
            outcome = run_steps(setup, record, view, interrupt)
            if config.checkpoint.save:
                save(setup.model, folder / "weights")
                view.note(f"weights saved in {folder / 'weights'}")
        return finish(setup, record, outcome, gauge, folder)


def run_steps(setup: Setup, record: Record, view: View, interrupt: Interrupt) -> Outcome:
    """Takes every step of the run, or as many as it can."""
    run, limit = setup.config.run, setup.config.optimizer.skip_limit
    row, held_out, skipped = None, math.nan, 0
    for step in range(run.steps):
        done = run_step(setup, step, stop=lambda: interrupt.asked)
        if done is None:
            return Outcome(Ending.interrupted, row, held_out)
        row = done
        record.write_step(row)
        view.show(row)
        skipped = skipped + 1 if row.skipped else 0
        if skipped > limit:
            return Outcome(Ending.diverged, row, held_out)
        if step + 1 == run.steps or (run.eval_every and (step + 1) % run.eval_every == 0):
            held_out = evaluate(setup)
            record.write("eval", step=step, loss=held_out)
            view.note(f"step {step + 1}  held-out loss {held_out:.4f}")
    return Outcome(Ending.finished, row, held_out)
