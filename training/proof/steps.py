"""The steps of a proof on a rank, as training takes them; experts may change places after each: numbers may not tell.

step 0 --> drawn places --> step 1 --> others --> step 2 --> back to where the plain model has them
"""

import torch
from torch import Tensor

from parallel.build import Shards, Stages
from parallel.exchange import find_exchanges
from parallel.mesh import Mesh
from training import microbatches
from training.engine import Engine
from training.move import move_experts
from training.pipeline import Runner
from training.proof.case import Case, share_batch
from training.proof.trace import Step, vary_rate


def take_step(case: Case, mesh: Mesh, stages: Stages, engine: Engine, runner: Runner, step: int) -> Step:
    """One step as training takes it."""
    batches = share_batch(case, mesh, step)
    denominators = microbatches.count_denominators(batches, case.model.mtp.depth, mesh)
    engine.begin()
    share = runner.step(engine, batches, denominators)
    assert share is not None
    totals = microbatches.total_over_ranks(share, mesh)
    update = engine.step(vary_rate(case, step))
    for model in stages.values():
        model.update_biases(totals.load, case.model.moe.bias_speed)
    return Step(*totals, update)


def shuffle_experts(case: Case, stages: Stages, shards: Shards, engine: Engine, mesh: Mesh, step: int) -> None:
    """After ``step``: weights and state of every layer's experts travel to slots that are drawn for each layer."""
    names, experts = find_exchanges(stages.values()), case.model.moe.experts
    generator = torch.Generator().manual_seed(1000 * case.seed + step)

    def draw() -> Tensor:
        last = step == case.steps - 1
        return torch.arange(experts) if last else torch.randperm(experts, generator=generator)

    move_experts(stages, shards, engine, {name: draw() for name in names}, mesh)
