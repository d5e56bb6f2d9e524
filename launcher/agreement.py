"""What ranks settle before they train: that all have one configuration, and which folder is the run's.

    rank 0: its values -> every rank: the same, or where they differ -> rank 0: a folder, or a mistake -> every rank
                                                                           once launcher/gate.py is content

A few short values per rank, through the store where the ranks meet; nothing is trained before all have agreed.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import RunConfig
from launcher import gate, ranks
from launcher.discover import Rank
from parallel.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import Store

Maker = Callable[[Topology], Path]


def agree(store: "Store", config: RunConfig, rank: Rank, make: Maker) -> Path:
    """The run's folder, once every rank is known to have rank 0's configuration. Raises as ``take_part``."""
    if rank.rank == 0:
        store.set("values", ranks.describe(config))
        store.set("hash", ranks.identify(config))
        store.set("here", str(rank.here))
    verdict = "same"
    if store.get("hash").decode() != ranks.identify(config):
        key, here, there = ranks.differ(ranks.describe(config), store.get("values").decode())
        verdict = f"{key}={here} on rank {rank.rank}, {there} on rank 0: start every rank with the same command"
    elif config.checkpoint.near_every and (first := int(store.get("here"))) != rank.here:
        verdict = (
            f"checkpoint.near_every={config.checkpoint.near_every} must be 0 where machines have different numbers of "
            f"ranks, so that each has a neighbour: that of rank {rank.rank} has {rank.here}, that of rank 0 {first}"
        )
    store.set(f"verdict {rank.rank}", verdict)
    if rank.rank == 0:
        store.set("outcome", json.dumps(_decide(store, config, rank.world, make)))
    outcome = json.loads(store.get("outcome"))
    if "folder" not in outcome:
        # The store may live in rank 0: it leaves last.
        store.set(f"read {rank.rank}", "yes")
        if rank.rank == 0:
            store.wait([f"read {other}" for other in range(rank.world)])
        if "unproved" in outcome:
            raise gate.UnprovedError(outcome["unproved"])
        raise ValueError(outcome["mistake"])
    return Path(outcome["folder"])


def _decide(store: "Store", config: RunConfig, world: int, make: Maker) -> dict[str, str]:
    for rank in range(world):
        verdict = store.get(f"verdict {rank}").decode()
        if verdict != "same":
            return {"mistake": verdict}
    try:
        return {"folder": str(make(ranks.check_layout(config, world)))}
    except gate.UnprovedError as error:
        return {"unproved": str(error)}
    except ValueError as error:
        return {"mistake": str(error)}
