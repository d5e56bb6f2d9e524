"""How many ranks a configuration asks for, what each may use, and whether two have the same: rules only, no torch."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from configs.cluster import Scheduler
from configs.schema import RunConfig
from parallel.config import ParallelConfig
from parallel.rules import check
from parallel.topology import Topology, arrange
from training.ramp import batch_sizes
from training.support import check_microbatches


def arrange_ranks(parallel: ParallelConfig, world: int | None) -> Topology:
    """The topology of ``world`` ranks, or, where nobody has started any, of as many as ``parallel`` asks for.

    ``parallel.dp`` takes what the other axes leave of the world; without a world it is 1.
    """
    degrees: dict[str, Any] = asdict(parallel)
    if world is None:
        degrees["dp"] = degrees["dp"] or 1
        world = degrees["pp"] * degrees["dp"] * degrees["cp"] * degrees["tp"]
    return arrange(world, **{axis: degrees[axis] for axis in ("pp", "dp", "cp", "tp", "ep")})


def check_layout(config: RunConfig, world: int | None) -> Topology:
    """The topology as in ``arrange_ranks``, but of a cluster, where nobody has started any, that of a rank on each
    device. ValueError also where the model or the batches do not fit it."""
    if world is None and _is_on_cluster(config):
        world = config.cluster.world
    topology = arrange_ranks(config.parallel, world)
    length = config.data.sequence_length
    check(config.model, length, batch_sizes(config.run), topology)
    check_microbatches(config.parallel, config.run, length, topology.dp)
    if config.parallel.pipeline.file is not None:
        from training.arrange import arrange_stages  # numpy: for those who need it

        arrange_stages(config, topology.dp)
    return topology


def check_own(config: RunConfig) -> Topology:
    """The topology of ranks that this machine starts by itself. ValueError as above, and where a cluster is to."""
    if _is_on_cluster(config):
        raise ValueError("cluster=slurm must be left away here: shoestring submit hands a run to Slurm")
    return check_layout(config, None)


def _is_on_cluster(config: RunConfig) -> bool:
    return config.cluster.scheduler is Scheduler.slurm


def identify(config: RunConfig) -> str:
    """A hash of every value of the configuration."""
    return hashlib.sha256(describe(config).encode()).hexdigest()


def describe(config: RunConfig) -> str:
    """Every value of the configuration as one line of JSON: equal for equal configurations."""
    return json.dumps(asdict(config), sort_keys=True)


def differ(mine: str, theirs: str) -> tuple[str, Any, Any]:
    """The first dotted key whose value differs between two configurations from ``describe``, and both values."""
    left, right = dict(_flatten(json.loads(mine))), dict(_flatten(json.loads(theirs)))
    key = next(key for key in {**left, **right} if left.get(key) != right.get(key))
    return key, left.get(key), right.get(key)


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
