"""A layout against the ranks there are, and a model and its batches against a layout. Standard library only."""

from configs.cluster import ClusterConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.rules import check, multiples
from parallel.topology import Topology
from training.config import RunSection
from training.ramp import batch_sizes
from training.support import check_microbatches


def check_sizes(
    parallel: ParallelConfig, replicas: int, model: ModelConfig, run: RunSection, sequence_length: int
) -> None:
    """Raises ValueError where a model or a batch of the run does not fit a layout with ``dp`` of ``replicas``."""
    p = parallel
    topology = Topology(pp=p.pp, dp=replicas, cp=p.cp, tp=p.tp, ep=p.ep)
    check(model, sequence_length, batch_sizes(run), topology)
    check_microbatches(parallel, run, sequence_length, replicas)


def fill(parallel: ParallelConfig, cluster: ClusterConfig) -> int:
    """``parallel.dp`` of a rank on each device of a cluster's nodes: where it is not said, what the other axes leave.

    Raises ValueError where there are other than so many ranks.
    """
    p, world = parallel, cluster.world
    there = f"cluster.nodes*devices_per_node = {cluster.nodes}*{cluster.devices_per_node} = {world}"
    there += ", spares apart" if cluster.spares else ""
    if p.dp is None and world % (others := p.pp * p.cp * p.tp):
        raise ValueError(
            f"parallel.pp*cp*tp = {p.pp}*{p.cp}*{p.tp} = {others} must divide {there}: there is a rank on each device, "
            f"and parallel.dp takes what is left; the nearest it divides: {multiples(world, others)}"
        )
    dp = world // (p.pp * p.cp * p.tp) if p.dp is None else p.dp
    if (ranks := p.pp * dp * p.cp * p.tp) != world:
        raise ValueError(
            f"parallel.pp*dp*cp*tp = {p.pp}*{dp}*{p.cp}*{p.tp} = {ranks} ranks must be {there}: there is a "
            "rank on each device; parallel.dp=null takes what is left"
        )
    return dp
