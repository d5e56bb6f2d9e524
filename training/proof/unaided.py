"""The first step's gradients as autograd gives them, summed over holders without an engine."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.batch import Batch, Losses
from parallel.build import Shards, Stages
from parallel.mesh import Axis, Mesh
from training import microbatches
from training.agree import sum_over
from training.engine import Hidden, Unrolling, differentiate, unroll_stage
from training.pipeline import Runner
from training.proof.case import Case, place_sequences, share_batch
from training.proof.parts import reduce_parts
from training.proof.trace import Choices, Trace, name_choices, take_gradient, watch_routers


class Unaided:
    """Stands where an engine would: gradients stay in ``.grad``, and what passes is watched."""

    def __init__(self, stages: Stages, batches: list[Batch]) -> None:
        self.loss, self.routing = torch.zeros((), dtype=torch.float64), Choices()
        self._stages, self._batches = stages, batches

    def forward(self, stage: int, batch: Batch, *args: Any) -> Any:
        """Runs the stage, and notes its share of the loss and where its routers sent the tokens."""
        with watch_routers(self._stages[stage]) as seen:
            losses = self._stages[stage](batch, *args)
        self._note(stage, batch, losses, seen)
        return losses

    def unroll(self, stage: int, batch: Batch, *args: Any) -> Unrolling:
        """The same, stopping now and then: in between others run, whose backwards may compute routers again."""
        program, seen = unroll_stage(self._stages[stage], batch, *args), list[Tensor]()
        while True:
            try:
                with watch_routers(self._stages[stage]) as some:
                    try:
                        wait = next(program)
                    finally:
                        seen += some
            except StopIteration as end:
                self._note(stage, batch, end.value.made, seen)
                return end.value
            yield wait

    def _note(self, stage: int, batch: Batch, losses: Losses, seen: list[Tensor]) -> None:
        model, number = self._stages[stage], next(i for i, other in enumerate(self._batches) if other is batch)
        self.loss += losses.total.detach()
        self.routing |= name_choices(model, seen, number, len(batch.ids))

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """Plain autograd."""
        differentiate(loss, hidden)

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """As autograd would."""
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad

    def finishing(self, stage: int, coming: object = None) -> None:
        """Nothing starts early."""

    def finished(self, stage: int) -> None:
        """Gradients are summed when all is done."""


def trace_unaided(case: Case, mesh: Mesh, stages: Stages, shards: Shards, runner: Runner) -> Trace:
    """A forward and backward of every micro-batch, each gradient summed over its holders. Collective over all ranks."""
    batches = share_batch(case, mesh, 0)
    engine = Unaided(stages, batches)
    denominators = microbatches.count_denominators(batches, case.model.mtp.depth, mesh)
    assert runner.step(engine, batches, denominators) is not None
    parameters = {name: p for model in stages.values() for name, p in model.named_parameters()}
    gradients = {name: take_gradient(parameter) for name, parameter in parameters.items()}
    gradients = reduce_parts(gradients, shards, mesh, dist.ReduceOp.SUM)
    read = torch.zeros(case.sequences, dtype=torch.int64)
    for place in place_sequences(case, mesh.coordinate(Axis.dp), 0):
        read[place] += 1
    others = case.topology.world // case.topology.dp  # ranks that read the same sequences
    loss = sum_over(engine.loss, mesh)
    return Trace({}, sum_over(read, mesh) // others, engine.routing, loss, gradients, [], [], {})
