"""Steps and evaluations by the programs of a pipeline; one rank is a pipeline too.

micro-batches of a step -> the program for as many (parallel/pipeline/plan.py) -> the interpreter, with the work of
training (training/work.py) -> sums of this rank
"""

from collections.abc import Callable, Sequence

import torch

from configs.schema import TrainConfig
from model.batch import Batch, Denominators
from model.config import ModelConfig
from parallel.config import EngineName, ParallelConfig
from parallel.mesh import Axis, Mesh, Traffic
from parallel.pipeline.plan import Pipeline, evaluation, program
from parallel.pipeline.run import Interpreter, Span
from training.arrange import arrange_stages
from training.determinism import NUMERICS
from training.work import Differentiator, Evaluation, Forwards, Mode, Shapes, Sums, Training


class Runner:
    """Steps and evaluations of a rank, by the programs of its pipeline."""

    def __init__(
        self, parallel: ParallelConfig, pipeline: Pipeline, shapes: Shapes, mesh: Mesh, compiled: bool = False
    ) -> None:
        """``compiled`` segments compute all gradients at once."""
        travels = parallel.ep > 1 and parallel.engine is EngineName.native
        self._mode, self._lanes = Mode(parallel.overlap.experts, fill=travels and not compiled), mesh.lanes
        self.pipeline, self._parallel, self._shapes = pipeline, parallel, shapes
        self._place = mesh.coordinate(Axis.pp)
        self._interpreter = Interpreter(mesh.group(Axis.pp, Traffic.pipeline), self._place)

    def step(
        self,
        engine: Differentiator,
        batches: Sequence[Batch],
        denominators: Denominators,
        stop: Callable[[], bool] | None = None,
        spans: list[Span] | None = None,
    ) -> Sums | None:
        """Forward and backward of every micro-batch. The sums of this rank, or None once ``stop`` says so."""
        steps = program(self._parallel, len(batches)).lists[self._place]
        work = Training(engine, batches, denominators, self._shapes, steps, self._mode)
        self._lanes.idle = work.idle
        return work.sums if self._interpreter.run(steps, work, stop, spans) else None

    def evaluate(self, engine: Forwards, batches: Sequence[Batch]) -> torch.Tensor:
        """This rank's share of the sums of cross entropy, [1 + D]."""
        work = Evaluation(engine, batches, self._shapes)
        self._lanes.idle = work.idle
        self._interpreter.run(evaluation(self.pipeline, len(batches)).lists[self._place], work)
        return work.losses


def shape_activations(model: ModelConfig, length: int, dtype: torch.dtype, mesh: Mesh) -> Shapes:
    """What travels between the stages of ``model`` where whole sequences have ``length`` tokens."""
    return Shapes(length // mesh.degree(Axis.sequence), model.hidden, 1 + model.mtp.depth, dtype, mesh.device)


def make_runner(config: TrainConfig, mesh: Mesh, compiled: bool = False) -> Runner:
    """The runner of a run. Raises ValueError for a pipeline that does not fit it: see ``arrange_stages``."""
    shapes = shape_activations(config.model, config.data.sequence_length, NUMERICS[config.precision].dtype, mesh)
    return Runner(config.parallel, arrange_stages(config, mesh.degree(Axis.dp)), shapes, mesh, compiled)
