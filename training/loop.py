"""A training run from its configuration to its summary: the file to read first.

    attend       a heartbeat all along, and last words where it ends by a fault                training/health/
    set_up       text -> token files; the model; the engine, which takes its parameters over       training/setup.py
    go_on        where the run has been before: the state of its newest good checkpoint          training/checkpoint/
    run_steps    one step after the other, each a row of the record                training/steps.py, training/step.py
                 now and then, and after the last one: the loss on held-out text                  training/evaluate.py
                 now and then, and at the end: a checkpoint, in the background         training/checkpoint/keeper.py
                 every few steps: a copy in the memory of this node and the next    training/checkpoint/neighbour.py
    save         the weights                                                                      training/save.py
    finish       a bigram model's loss, a sample of text, where everything is                     training/finish.py

Ctrl-C, and losses that are not finite for too long, end the steps early; what there is, is saved all the same.

Every rank runs all of it, with its part of the model and of the data. Rank 0 alone writes and draws the sample; what
the others print, the same steps, goes to their logs.
"""

from pathlib import Path

from configs.schema import TrainConfig
from parallel.mesh import Mesh
from training.checkpoint.resume import go_on
from training.finish import Ending, Summary, finish
from training.health.attend import attend
from training.machine import join_mesh
from training.setup import set_up
from training.sinks import open_record
from training.steps import run_steps
from training.watchers import watch
from training.whole import save_weights


def train(config: TrainConfig, folder: Path, price: float = 0.0) -> Summary:
    """Trains as ``config`` says; ``folder`` exists and gets ``metrics.jsonl``, ``weights/``, ``sample.txt`` and,
    of a pipeline, ``schedule.svg`` and ``schedule.txt``.

    Every rank that a launcher started calls it alike. ``price`` is that of all devices, an hour. The summary is the
    same on all ranks but for the bigram loss, which rank 0 alone measures.
    Raises ValueError for mistakes in the configuration that only show here: see ``join_mesh``, ``set_up`` and
    ``open_record``.
    """
    with join_mesh(config) as mesh:
        return train_on(mesh, config, folder, price)


def train_on(mesh: Mesh, config: TrainConfig, folder: Path, price: float = 0.0) -> Summary:
    """``train`` on a mesh that is there already. Collective over its ranks."""
    first = mesh.rank == 0
    with (
        attend(mesh, config, folder, price) as attendance,
        open_record(config.run.sinks, folder, first, config.telemetry.prometheus) as record,
    ):
        report = print if first else _say_nothing
        setup = set_up(config, report, mesh)
        attendance.follow(setup, report)
        setup, progress = go_on(setup, folder, record, report)
        attendance.begin(progress)
        with watch(setup, progress, folder, record, attendance.ledger) as watchers:
            note = watchers.view.note
            attendance.follow(setup, note)
            outcome = run_steps(setup, progress, watchers)
            ending = outcome.ending
            attendance.ledger.switch("checkpoints")
            interrupted = ending is Ending.interrupted
            saved = watchers.keeper.close(progress, ending is not Ending.diverged, interrupted)
            watchers.neighbour.close(interrupted and not saved)
            attendance.ledger.switch("ending")
            setup.engine.settle()  # nobody leaves while others wait for weights
            if config.checkpoint.save:
                save_weights(setup, folder / "weights")
                note(f"weights saved in {folder / 'weights'}")
        attendance.leave()
        return finish(setup, record, outcome, watchers.gauge, attendance.ledger)


def _say_nothing(line: str) -> None:
    pass
