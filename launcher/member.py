"""One rank of several: it agrees with the others on one configuration and one folder, then trains.

    rank 0: its values -> every rank: the same, or where they differ -> rank 0: a folder, or a mistake -> every rank
                                                                           once launcher/gate.py is content

A few short values per rank, through the store where the ranks meet; nothing is trained before all have agreed.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import RunConfig
from launcher import cli, folder, gate, ranks
from launcher.invocation import Invocation
from launcher.logs import log_of
from parallel.topology import Topology

if TYPE_CHECKING:
    from torch.distributed import Store

    from training.finish import Ending


Maker = Callable[[Topology], Path]


def join(config: RunConfig, rank: ranks.Rank, invocation: Invocation) -> "Ending":
    """Trains as a rank that somebody else started, torchrun for example; rank 0 is the one whose lines are seen.

    Raises ValueError for a mistake on rank 0; on other ranks SystemExit, so that it is printed once. SystemExit on all
    ranks, after a report of rank 0, if the layout's proof failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    made = []

    def make(topology: Topology) -> Path:
        made.append(folder.create(config, invocation, gate.admit(config, topology, invocation)))
        print(f"run {made[0]}", flush=True)
        return made[0]

    try:
        ending = record(take_part)(config, rank, make, own_log=rank.rank > 0)
    except gate.UnprovedError as error:
        if rank.rank == 0:
            print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except ValueError as error:
        if not cli.is_mistake(error):
            raise
        if rank.rank:
            raise SystemExit(2) from None
        for path in made:
            folder.discard_unstarted(path)
        raise
    assert ending is not None
    return ending


def take_part(config: RunConfig, rank: ranks.Rank, make: Maker, own_log: bool = False) -> "Ending":
    """Trains as one rank of several. Rank 0 makes the run's folder, by ``make``, once all have the same configuration.

    With ``own_log``, what is printed goes to the rank's log instead. Raises ValueError, on every rank the same, where
    the configurations differ, do not fit the number of ranks, or ``make`` refuses; so with its ``UnprovedError``.
    """
    from parallel.mesh import meet

    store, _, _ = meet()
    path = agree(store, config, rank, make)
    check_devices(config, rank)
    from training.determinism import count_cores
    from training.loop import train

    threads = ranks.share_threads(config.run.threads, count_cores(), rank.here)
    config = replace(config, run=replace(config.run, threads=threads))
    with ExitStack() as stack:
        if own_log:
            log_of(path, rank.rank).parent.mkdir(parents=True)
            stack.enter_context(redirect_stdout(stack.enter_context(log_of(path, rank.rank).open("w", buffering=1))))
        return train(config, path, config.cluster.price_per_device_hour * rank.world).ending


def check_devices(config: RunConfig, rank: ranks.Rank) -> None:
    """Raises ValueError where a machine has fewer devices than ranks: each needs one of its own, except of CPUs."""
    import torch

    from training.determinism import choose_device

    device = choose_device(config.run.device)
    if device.type != "cpu" and rank.here > (found := torch.accelerator.device_count()):
        raise ValueError(
            f"run.device={config.run.device}: this machine has {found} for {rank.here} ranks: start fewer here, or "
            "choose run.device=cpu"
        )


def agree(store: "Store", config: RunConfig, rank: ranks.Rank, make: Maker) -> Path:
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
