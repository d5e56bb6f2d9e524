"""Which rank this process is, how many there are, and what each may use: rules only, no process, no torch.

Whoever starts ranks (torchrun, Slurm's launchers, or this program itself, launcher/agent.py) tells each by environment:

    RANK, WORLD_SIZE                which of how many
    LOCAL_RANK, LOCAL_WORLD_SIZE    the same among the ranks of its machine
    MASTER_ADDR, MASTER_PORT        where they find each other
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from configs.schema import RunConfig
from parallel.config import ParallelConfig
from parallel.rules import check
from parallel.topology import Topology, arrange
from training.ramp import batch_sizes
from training.support import check_microbatches

LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface of ranks that stay on one machine


class Rank(NamedTuple):
    """One process of several that train together."""

    rank: int
    world: int  # ranks in all
    local: int  # its place among the ranks of its machine
    here: int  # ranks of its machine


def discover(environment: Mapping[str, str]) -> Rank | None:
    """The rank that ``environment`` makes this process, or None where nobody started several.

    Raises ValueError for variables that are missing, are no numbers, or contradict each other.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    rank, world = _read(environment, "RANK"), _read(environment, "WORLD_SIZE")
    local, here = _read(environment, "LOCAL_RANK", rank), _read(environment, "LOCAL_WORLD_SIZE", world)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise ValueError(
                f"{name} is missing in the environment, though RANK={rank} and WORLD_SIZE={world} are there"
            )
    if rank >= world:
        raise ValueError(f"RANK={rank} in the environment must be below WORLD_SIZE={world}")
    if local >= here:
        raise ValueError(f"LOCAL_RANK={local} in the environment must be below LOCAL_WORLD_SIZE={here}")
    return Rank(rank, world, local, here)


def _read(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The number in a variable; ``default`` is what it is on a single machine."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise ValueError(
            f"{name} is missing in the environment, though other variables of a launcher are there: start with "
            "torchrun, or unset RANK and WORLD_SIZE"
        )
    if not text.isdecimal() or (int(text) == 0 and name.endswith("SIZE")):
        raise ValueError(f"{name}={text} in the environment must be a number")
    return int(text)


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
    """The topology as in ``arrange_ranks``; ValueError also where the model or the batches do not fit it."""
    topology = arrange_ranks(config.parallel, world)
    length = config.data.sequence_length
    check(config.model, length, batch_sizes(config.run), topology)
    check_microbatches(config.parallel, config.run, length, topology.dp)
    if config.parallel.pipeline.file is not None:
        from training.arrange import arrange_stages  # numpy: for those who need it

        arrange_stages(config, topology.dp)
    return topology


def share_threads(asked: int | None, cores: int, here: int) -> int:
    """Threads of one rank: ``run.threads``, else an equal share of its machine's cores, at least 1."""
    return asked or max(1, cores // here)


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
