"""The micro-batches of one step, over all ranks: what their sums are divided by, forward and backward, the totals.

losses, aux, load    a rank has its share of them: the whole is the sum over the ranks of its stage
labels, sequences    ranks of one place along dp read the same sequences: the whole is the sum over dp alone
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Batch, Denominators, count_labels
from model.transformer import Transformer
from parallel.exchange import take_travelled
from parallel.locality import Travel
from parallel.mesh import Mesh
from parallel.topology import Axis
from training.agree import sum_over
from training.engine import STAGE, Engine


class Totals(NamedTuple):
    """Sums over the micro-batches of a step."""

    losses: Tensor  # [1 + D] cross entropy in nats
    aux: Tensor  # auxiliary loss over sequences and layers
    load: Tensor  # [routed layers, E] tokens per expert


def count_denominators(batches: Sequence[Batch], depth: int, mesh: Mesh) -> Denominators:
    """What the sums of a global batch are divided by; 1 where nothing counts, so that nothing becomes 0 / 0.

    ``batches`` are this rank's. Collective over dp.
    """
    counts = [sum(column) for column in zip(*(count_labels(batch, depth) for batch in batches), strict=True)]
    total = torch.tensor([*counts, sum(len(batch.ids) for batch in batches)], device=mesh.device)
    *tokens, sequences = sum_over(total, mesh, Axis.dp).tolist()
    return Denominators(tuple(float(max(1, count)) for count in tokens), float(sequences))


def accumulate(
    engine: Engine, batches: Sequence[Batch], denominators: Denominators, stop: Callable[[], bool]
) -> Totals | None:
    """Runs every micro-batch forward and backward. Returns the sums of this rank, or None once ``stop`` says so."""
    totals = None
    for batch in batches:
        if stop():
            return None
        losses = engine.forward(STAGE, batch, denominators)
        engine.backward(STAGE, losses.total)
        here = Totals(losses.sums, losses.aux, losses.load)
        totals = here if totals is None else Totals(*(a + b for a, b in zip(totals, here, strict=True)))
    engine.finished(STAGE)
    return totals


def total_over_ranks(share: Totals, mesh: Mesh) -> Totals:
    """The sums of the whole stage from those of its ranks, losses in float64. Collective over the stage.

    One vector travels, in float64, which holds counts below 2^53 exactly.
    """
    vector = sum_over(torch.cat([part.double().flatten() for part in share]), mesh, Axis.stage)
    losses, aux, load = vector.split([part.numel() for part in share])
    return Totals(losses, aux[0], load.view(share.load.shape).long())


def total_travel(model: Transformer, mesh: Mesh) -> Travel:
    """How far the tokens of the micro-batches since the last call have travelled. Collective over the stage."""
    return Travel(*sum_over(take_travelled(model, mesh), mesh, Axis.stage).tolist())
