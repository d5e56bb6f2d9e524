"""The proof: a layout's numbers against those of the plain model on one device, in float64.

    plain model    whole global batch, one forward          loss, routing, gradients, norm, weights after some steps
    this layout    micro-batches, shards, engine            the same, each rank its own part
                   compared rank by rank: a shard with the cut of the plain tensor, exact counts with exact counts

Every rank computes the plain run for itself; the models are small.
"""

import torch.distributed as dist

from parallel.mesh import Mesh
from parallel.topology import Axis
from parallel.traffic import Traffic
from training.proof.case import Case
from training.proof.compare import compare
from training.proof.plain import Reference, trace_plain
from training.proof.report import Difference, Report, allow, summarise
from training.proof.sharded import trace_sharded


def prove(case: Case, mesh: Mesh, reference: Reference | None = None) -> Report:
    """Runs the case on this rank and, without a ``reference``, on the plain model. Collective over all ranks."""
    reference = reference or trace_plain(case)
    trace, shards = trace_sharded(case, mesh, reference.start)
    found = list(compare(case, mesh, reference.trace, trace, shards))
    everyone: list[list[Difference]] = [[] for _ in range(mesh.topology.world)]
    dist.all_gather_object(everyone, found, group=mesh.group(Axis.world, Traffic.control))
    found = [difference for rank in everyone for difference in rank]
    return Report(tuple(summarise(found, allow(case.engine))))
