"""The mesh of a single rank, in the test's own process."""

import torch
import torch.distributed as dist
from torch import nn

from parallel.mesh import Mesh
from parallel.placement import REPLICATED, Shard, cut
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.native import Native


def alone() -> Mesh:
    """This process as the only rank. tests/conftest.py ends what this starts."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return Mesh(Topology(), torch.device("cpu"))


def whole(module: nn.Module, mesh: Mesh) -> dict[str, Shard]:
    """Every parameter of ``module`` as replicated."""
    return {name: cut(p.shape, REPLICATED, mesh.topology, mesh.rank) for name, p in module.named_parameters()}


def make_engine(module: nn.Module, config: OptimizerConfig) -> Native:
    """The native engine of one rank over ``module``, as stage 0."""
    mesh = alone()
    return Native({0: module}, whole(module, mesh), mesh, config)
