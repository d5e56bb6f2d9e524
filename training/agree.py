"""Small things that ranks must agree on, each one collective or two over a group of control traffic."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.doing import Doing, doing
from parallel.mesh import Mesh
from parallel.topology import Axis
from parallel.traffic import Traffic

Flags = TypeVar("Flags", bound=tuple[Any, ...])
LONGEST = 1000  # bytes of what a rank tells others


@doing("an agreement along {axis}")
def sum_over(tensor: Tensor, mesh: Mesh, axis: Axis = Axis.world) -> Tensor:
    """The sum of ``tensor`` over the ranks along ``axis`` (dp, stage or world), in place, the same bits on all."""
    with Doing(waiting=True):
        dist.all_reduce(tensor, group=mesh.group(axis, Traffic.control))
    return tensor


def any_rank(mesh: Mesh, flag: bool) -> bool:
    """Whether ``flag`` is set on any rank of the world."""
    return bool(sum_over(torch.tensor(int(flag), device=mesh.device), mesh).item())


def agree(mesh: Mesh, flags: Flags) -> Flags:
    """Of a named tuple of flags, those that are set on any rank of the world."""
    found = sum_over(torch.tensor(flags, dtype=torch.int64, device=mesh.device), mesh)
    return type(flags)(*found.bool().tolist())


def tell(mesh: Mesh, text: str) -> list[str]:
    """What every rank of the world has to say, by rank, those left out that have nothing; cut off at ``LONGEST``."""
    if not any_rank(mesh, bool(text)):
        return []
    said = torch.zeros(mesh.topology.world, LONGEST, dtype=torch.uint8)
    content = text.encode()[:LONGEST]
    said[mesh.rank, : len(content)] = torch.tensor(list(content), dtype=torch.uint8)
    lines = sum_over(said.to(mesh.device), mesh).cpu()
    return [line for row in lines if (line := bytes(row.tolist()).rstrip(b"\0").decode(errors="replace"))]


def wait_for_all(mesh: Mesh) -> None:
    """Returns once every rank of the world is here."""
    any_rank(mesh, False)
