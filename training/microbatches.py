"""The micro-batches of one step, over all ranks: what their sums are divided by, and the totals.

losses, aux, load    a rank has its share of them: the whole is the sum over all ranks, whatever stages they have
labels, sequences    ranks of one place along dp read the same sequences: the whole is the sum over dp alone
"""

from collections.abc import Iterable, Sequence

import torch

from model.batch import Batch, Denominators, count_labels
from model.transformer import Transformer
from parallel.exchange import take_travelled
from parallel.locality import Travel
from parallel.mesh import Mesh
from parallel.topology import Axis
from training.agree import sum_over
from training.work import Sums


def count_denominators(batches: Sequence[Batch], depth: int, mesh: Mesh) -> Denominators:
    """What the sums of a global batch are divided by; 1 where nothing counts, so that nothing becomes 0 / 0.

    ``batches`` are this rank's. Collective over dp.
    """
    counts = [sum(column) for column in zip(*(count_labels(batch, depth) for batch in batches), strict=True)]
    total = torch.tensor([*counts, sum(len(batch.ids) for batch in batches)], device=mesh.device)
    *tokens, sequences = sum_over(total, mesh, Axis.dp).tolist()
    return Denominators(tuple(float(max(1, count)) for count in tokens), float(sequences))


def total_over_ranks(share: Sums, mesh: Mesh) -> Sums:
    """The sums of the whole model from those of its ranks, losses in float64. Collective over all ranks.

    One vector travels, in float64, which holds counts below 2^53 exactly.
    """
    vector = sum_over(torch.cat([part.double().flatten() for part in share]), mesh)
    losses, aux, load = vector.split([part.numel() for part in share])
    return Sums(losses, aux[0], load.view(share.load.shape).long())


def total_travel(models: Iterable[Transformer], mesh: Mesh) -> Travel:
    """How far the tokens of the micro-batches since the last call have travelled. Collective over all ranks."""
    return Travel(*sum_over(take_travelled(models, mesh), mesh).tolist())
