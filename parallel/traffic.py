"""Who talks to whom about what, as a table: one line a group that a rank is in. Data only, no torch.

Each kind of traffic has groups of its own, because two collectives on one group share its connections: a small message
behind a bulk one waits for it.
"""

from enum import StrEnum

from parallel.topology import Axis


class Traffic(StrEnum):
    """What travels."""

    tensor = "tensor"  # activations between shards of a sequence
    tokens = "tokens"  # rows to experts and back
    counts = "counts"  # how many rows
    pipeline = "pipeline"  # activations between stages, and their gradients
    data = "data"  # gradients and weights
    control = "control"  # statistics, agreements
    copies = "copies"  # of state, in the background, between hosts: see Mesh.aside


GROUPS = {
    (Axis.tp, Traffic.tensor): "activations between shards of a sequence",
    (Axis.sequence, Traffic.control): "statistics of the sequences that its ranks share",
    (Axis.ep, Traffic.tokens): "tokens to experts and back",
    (Axis.ep, Traffic.counts): "how many tokens",
    (Axis.pp, Traffic.pipeline): "activations between stages, and their gradients",
    (Axis.stage, Traffic.data): "gradients and weights that every rank of a stage holds",
    (Axis.replicas, Traffic.data): "gradients and weights that are split over tp",
    (Axis.edp, Traffic.data): "gradients and weights of routed experts",
    (Axis.dp, Traffic.control): "counts of labels",
    (Axis.stage, Traffic.control): "losses, loads, norms",
    (Axis.world, Traffic.control): "agreements",
}
