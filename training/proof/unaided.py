"""The first step's gradients as autograd gives them, summed over holders without an engine."""

import torch
import torch.distributed as dist

from model.transformer import Transformer
from parallel.mesh import Mesh
from parallel.placement import Shard
from training import microbatches
from training.agree import sum_over
from training.proof.case import Case, place_sequences, share_batch
from training.proof.parts import reduce_parts
from training.proof.trace import Trace, stack_choices, take_gradient, watch_routers


def differentiate(case: Case, mesh: Mesh, model: Transformer, shards: dict[str, Shard]) -> Trace:
    """A forward and backward of every micro-batch, each gradient summed over its holders. Collective over all ranks."""
    batches, routing, loss = share_batch(case, mesh, 0), [], torch.zeros((), dtype=torch.float64)
    denominators = microbatches.count_denominators(batches, case.model.mtp.depth, mesh)
    for batch in batches:
        with watch_routers(model) as seen:
            losses = model(batch, denominators)
        losses.total.backward()
        loss += losses.total.detach()
        routing.append(stack_choices(seen, len(batch.ids)))
    gradients = {name: take_gradient(parameter) for name, parameter in model.named_parameters()}
    gradients = reduce_parts(gradients, shards, mesh, dist.ReduceOp.SUM)
    read = torch.zeros(case.sequences, dtype=torch.int64)
    for place in place_sequences(case, mesh, 0):
        read[place] += 1
    others = case.topology.stage_size // case.topology.dp  # ranks that read the same sequences
    return Trace(
        {}, sum_over(read, mesh) // others, torch.cat(routing, dim=1), sum_over(loss, mesh), gradients, [], [], {}
    )
