"""Small numbers that ranks must agree on, each one collective over a group of control traffic."""

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from parallel.topology import Axis
from parallel.traffic import Traffic


def sum_over(tensor: Tensor, mesh: Mesh, axis: Axis = Axis.world) -> Tensor:
    """The sum of ``tensor`` over the ranks along ``axis`` (dp, stage or world), in place, the same bits on all."""
    dist.all_reduce(tensor, group=mesh.group(axis, Traffic.control))
    return tensor


def any_rank(mesh: Mesh, flag: bool) -> bool:
    """Whether ``flag`` is set on any rank of the world."""
    return bool(sum_over(torch.tensor(int(flag), device=mesh.device), mesh).item())


def wait_for_all(mesh: Mesh) -> None:
    """Returns once every rank of the world is here."""
    any_rank(mesh, False)
