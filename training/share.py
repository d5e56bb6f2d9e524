"""Which parameters share a slab, in which order, and which stages their buckets belong to.

    alike    the same stages, holders, dtype and decay                                         one slab
    order    from the model's end to its beginning: a backward completes one bucket after the other

A pure function of names, shapes and configuration.
"""

from collections.abc import Mapping

from torch import nn

from parallel.mesh import Mesh
from parallel.placement import Shard
from training.config import MomentDtype, OptimizerConfig
from training.engine import Share, name_parameters
from training.optimizer import match
from training.slab import Bucket, Entry, Slab


def share_slabs(
    stages: Mapping[int, nn.Module], shards: Mapping[str, Shard], mesh: Mesh, config: OptimizerConfig
) -> list[Share[Bucket]]:
    """Makes the slabs, which take the parameters' storage over. Returns all their buckets.

    Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
    """
    named, users = name_parameters(stages)
    order, undecayed = {name: place for place, name in enumerate(named)}, match(config.no_decay, named)
    alike: dict[tuple[object, ...], list[Entry]] = {}
    for name, parameter in reversed(named.items()):
        shard = shards[name]
        key = users[name], name in undecayed, shard.placement.holders, shard.across, parameter.dtype
        alike.setdefault(key, []).append(Entry(name, parameter, shard))
    shares: list[Share[Bucket]] = []
    for (_, kept, *_), entries in alike.items():
        decay, narrow = 0.0 if kept else config.weight_decay, config.moments is MomentDtype.bf16
        slab = Slab(entries, mesh, decay, narrow, config.bucket_bytes)
        shares += [Share(users[entries[0].name], slab.crosses, bucket) for bucket in slab.buckets(order)]
    return shares
