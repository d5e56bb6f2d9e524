"""Everything a run needs, made from its configuration in one place and in one order. Every rank does it alike."""

from collections.abc import Callable
from dataclasses import dataclass

from configs.schema import TrainConfig
from parallel.doing import doing
from parallel.mesh import Mesh
from training.average import Average
from training.engines import Engine, Shards, Stages, hand_over
from training.machine import Machine, prepare_machine
from training.pipeline import Runner, make_runner
from training.placer import Placer
from training.ramp import BatchSchedule, schedule_batches
from training.text import Text, open_shared_text
from training.weights import build_parts, count_parameters


@dataclass(frozen=True, slots=True)
class Setup:
    """A run that is ready to take its first step."""

    config: TrainConfig
    mesh: Mesh
    machine: Machine
    text: Text
    schedule: BatchSchedule
    stages: Stages  # this rank's part of the model
    shards: Shards  # which part of the whole each parameter is
    engine: Engine  # owns the parameters
    average: Average  # of the weights
    placer: Placer  # moves experts between ranks
    runner: Runner  # of its steps and evaluations

    def facts(self) -> dict[str, object]:
        """What the record opens with."""
        return {
            **self.machine.facts(),
            "data": self.text.digest,
            "parameters": count_parameters(self.config.model),
        }


@doing("setting up")
def set_up(config: TrainConfig, report: Callable[[str], None], mesh: Mesh) -> Setup:
    """Prepares the text, builds this rank's part of the model and hands its parameters to the engine. Collective.

    ``report`` gets lines for a person. Raises ValueError for what does not fit: a layout that cannot train the model, a
    vocabulary too small, damaged token files or weights.
    """
    machine = prepare_machine(config, mesh)
    text = open_shared_text(config, report, mesh)
    schedule = schedule_batches(config.run, config.data.sequence_length)
    runner = make_runner(config, mesh, machine.compiled)
    mesh.share(runner.pipeline.shared(config.model))
    stages, shards = build_parts(config, mesh, runner.pipeline)
    engine = hand_over(stages, shards, mesh, config)
    if machine.compiled:
        from model.compile import compile_segments

        for model in stages.values():
            compile_segments(model)
    report(f"{config.model.name} in {config.precision} on {machine.describe()}")
    average = Average(engine, mesh.device, config.optimizer.ema)
    placer = Placer(stages, shards, engine, average, mesh, config.parallel.rebalance_every)
    return Setup(config, mesh, machine, text, schedule, stages, shards, engine, average, placer, runner)
