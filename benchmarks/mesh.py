"""How long a rank takes to find out who it talks to, before anything is sent.

groups    the ranks of all of a rank's groups, in a world of 16,384: arithmetic
mesh      its process groups, in a world of 2048: torch's fake backend makes them and connects nothing
gloo      its process groups on real ranks of this machine, connected

python benchmarks/mesh.py --rounds 9 --ranks 4
"""

import argparse
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch.testing._internal.distributed.fake_pg import FakeStore

from parallel.mesh import Mesh, connect, disconnect
from parallel.topology import Axis, Topology

LARGE = Topology(pp=16, dp=64, cp=2, tp=8, ep=64)  # 16,384 ranks
MANY = Topology(pp=4, dp=32, cp=2, tp=8, ep=64)  # 2048 ranks, no two groups alike
DEEPSEEK = Topology(pp=16, dp=128, ep=64)  # 2048 ranks
CPU = torch.device("cpu")


def time_groups(topology: Topology) -> float:
    """Seconds for all groups of one rank."""
    started = perf_counter()
    for axis in Axis:
        topology.group(topology.world * 2 // 3, axis)
    return perf_counter() - started


def time_mesh(topology: Topology) -> float:
    """Seconds for the process groups of one rank of a world that is not there."""
    rank = topology.world * 2 // 3
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world)
    started = perf_counter()
    Mesh(topology, CPU)
    seconds = perf_counter() - started
    dist.destroy_process_group()
    return seconds


def time_gloo(rank: int, world: int, folder: Path) -> None:
    """Prints, on the first rank, the seconds for process groups that are connected."""
    torch.set_num_threads(1)
    connect(CPU, rank, world, folder / "store")
    dist.barrier()
    started = perf_counter()
    Mesh(Topology(dp=world // 2, tp=2, ep=2), CPU)
    if rank == 0:
        print(f"gloo    {world} ranks on one machine: {(perf_counter() - started) * 1e3:.1f} ms")
    disconnect()


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ranks", type=int, default=4, help="of this machine; even")
    options = parser.parse_args()
    seconds = median(time_groups(LARGE) for _ in range(options.rounds))
    print(f"groups  {LARGE.world} ranks, {len(Axis)} axes: {seconds * 1e3:.2f} ms a rank")
    for topology in (MANY, DEEPSEEK):
        seconds = median(time_mesh(topology) for _ in range(options.rounds))
        print(f"mesh    {topology.world} ranks, {topology}: {seconds * 1e3:.1f} ms a rank")
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(time_gloo, (options.ranks, Path(folder)), options.ranks)


if __name__ == "__main__":
    main()
