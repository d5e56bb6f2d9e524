"""One rank of several: all agree on one configuration and one folder (launcher/agreement.py), then it trains."""

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from configs.schema import RunConfig
from launcher import cli, folder, gate
from launcher.agreement import Maker, agree
from launcher.cores import share_cores
from launcher.discover import Rank
from launcher.entry import enter
from launcher.logs import log_of

if TYPE_CHECKING:
    from parallel.topology import Topology
    from training.finish import Ending


def join(config: RunConfig, rank: Rank, make: Maker) -> "Ending | None":
    """Does what the folder that ``make`` makes asks for, as a rank that somebody else started, torchrun for example;
    rank 0 is the one whose lines are seen. None where that was not to train.

    Raises ValueError for a mistake on rank 0; on other ranks SystemExit, so that it is printed once. SystemExit on all
    ranks, after a report of rank 0, if the layout's proof failed.
    """
    from torch.distributed.elastic.multiprocessing.errors import record

    made = []

    def make_once(topology: "Topology") -> Path:
        made.append(make(topology))
        return made[0]

    try:
        with enter(rank, config.network) as rank:
            ending = record(take_part)(config, rank, make_once, own_log=rank.rank > 0)
    except gate.UnprovedError as error:
        if rank.rank == 0:
            print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except ValueError as error:
        if not cli.is_mistake(error):
            raise
        if rank.rank:
            raise SystemExit(cli.name_exit(error)) from None
        for path in made:
            folder.discard_unstarted(path)
        raise
    return ending


def take_part(config: RunConfig, rank: Rank, make: Maker, own_log: bool = False) -> "Ending | None":
    """Trains as one rank of several. Rank 0 makes the run's folder, by ``make``, once all have the same configuration.

    With ``own_log``, what is printed goes to the rank's log instead. Raises ValueError, on every rank the same, where
    the configurations differ, do not fit the number of ranks, or ``make`` refuses; so with its ``UnprovedError``, and
    with UnfitError where a machine is unfit. Returns None where the folder asks for an evaluation, or machines are
    checked alone: launcher/evaluation/, launcher/preflight/.
    """
    from parallel.mesh import meet

    store, _, _ = meet()
    path = agree(store, config, rank, make)
    check_devices(config, rank)
    from launcher.evaluation import job
    from launcher.preflight.check import open_preflight
    from training.loop import train_on
    from training.machine import join_mesh

    cores = share_cores(store, rank, config.run.affinity)
    config = replace(config, run=replace(config.run, threads=config.run.threads or cores))
    with ExitStack() as stack:
        if own_log:
            log_of(path, rank.rank).parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(redirect_stdout(stack.enter_context(log_of(path, rank.rank).open("w", buffering=1))))
        preflight = open_preflight(config, rank, store, path)
        if preflight is not None:
            preflight.check_machines()
        with join_mesh(config) as mesh:
            if (request := job.read(path)) is not None:
                job.serve(mesh, config, path, request)
                return None
            if preflight is not None:
                preflight.check_network(mesh)
                if preflight.alone:
                    return None
            return train_on(mesh, config, path, config.cluster.price_per_device_hour * rank.world).ending


def serve_alone(config: RunConfig, path: Path) -> "Ending | None":
    """Trains as the only rank, in the run's folder ``path``. Raises UnfitError where its machine is unfit; returns
    None where that is all that was asked."""
    from torch.distributed import HashStore

    from launcher.preflight.check import open_preflight
    from training.loop import train

    preflight = open_preflight(config, Rank(0, 1, 0, 1), HashStore(), path)
    if preflight is not None:
        preflight.check_machines()
        preflight.check_network(None)
        if preflight.alone:
            return None
    return train(config, path, config.cluster.price_per_device_hour).ending


def check_devices(config: RunConfig, rank: Rank) -> None:
    """Raises ValueError where a machine has fewer devices than ranks: each needs one of its own, except of CPUs."""
    import torch

    from training.determinism import choose_device

    device = choose_device(config.run.device)
    if device.type != "cpu" and rank.here > (found := torch.accelerator.device_count()):
        raise ValueError(
            f"run.device={config.run.device}: this machine has {found} for {rank.here} ranks: start fewer here, or "
            "choose run.device=cpu"
        )
