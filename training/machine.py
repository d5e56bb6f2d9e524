"""What a rank computes on: its device and threads, whether segments are compiled, and its place among the ranks."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import torch

from configs.schema import TrainConfig
from parallel.mesh import Mesh, connect, disconnect
from parallel.rules import check
from parallel.topology import Topology, arrange
from training import determinism
from training.compilation import decide_compile
from training.ramp import batch_sizes


class Machine(NamedTuple):
    """A rank's means."""

    device: str  # its name
    ranks: int  # in all
    threads: int  # of this rank
    compiled: bool
    reason: str  # why compiled or not, in a line

    def describe(self) -> str:
        """In a line."""
        among = f"{self.ranks} ranks of " if self.ranks > 1 else ""
        return f"{self.device}, {among}{self.threads} threads; {self.reason}"

    def eagerly(self) -> AbstractContextManager[object]:
        """Inside, segments run as they are, compiled or not."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def facts(self) -> dict[str, object]:
        """For the record."""
        return {
            "torch": torch.__version__,
            "device": self.device,
            "ranks": self.ranks,
            "threads": self.threads,
            "compiled": self.compiled,
        }


@contextmanager
def join_mesh(config: TrainConfig) -> Iterator[Mesh]:
    """The mesh of ``parallel.*`` over the ranks that a launcher started; without one, over this process alone.

    Raises ValueError for a device that is not there and for degrees that do not fit the number of ranks.
    """
    device = determinism.choose_device(config.run.device)
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    patience = config.parallel.patience
    connect(device, timeout=patience)
    try:
        topology = arrange_world(config, torch.distributed.get_world_size())
        yield Mesh(topology, device, patience, config.parallel.overlap.multiprocessors)
    except BaseException:
        # Others may be waiting for this rank: there is no parting in order, and the process ends.
        if torch.distributed.get_world_size() == 1:
            torch.distributed.destroy_process_group()
        raise
    disconnect()


def arrange_world(config: TrainConfig, world: int) -> Topology:
    """The topology of ``parallel.*`` for ``world`` ranks. ValueError where they do not fit."""
    p = config.parallel
    return arrange(world, pp=p.pp, dp=p.dp, cp=p.cp, tp=p.tp, ep=p.ep)


def prepare_machine(config: TrainConfig, mesh: Mesh) -> Machine:
    """Sets threads and numerics for the whole process.

    Raises ValueError for a layout that cannot train the model, and where ``run.compile`` asks for what is not there.
    """
    check(config.model, config.data.sequence_length, batch_sizes(config.run), mesh.topology)
    compiled, reason = decide_compile(config, mesh.device.type)
    threads = determinism.fix_numerics(mesh.device, config.run.threads, config.run.deterministic)
    return Machine(determinism.name_device(mesh.device), mesh.topology.world, threads, compiled, reason)
