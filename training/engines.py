"""The engines by name (``parallel.engine``). All of them take over a model in the dtype that it computes in.

Whatever the engine, masters start from these values: in bfloat16, from what drawn or published weights round to.
"""

from collections.abc import Callable

import torch

from configs.schema import TrainConfig
from parallel.build import Shards, Stages
from parallel.config import EngineName
from parallel.mesh import Mesh
from training.config import OptimizerConfig
from training.determinism import NUMERICS
from training.engine import Engine
from training.support import DEEPSPEED

Maker = Callable[[Stages, Shards, Mesh, OptimizerConfig, torch.dtype], Engine]


def build_engine(
    name: EngineName, stages: Stages, shards: Shards, mesh: Mesh, config: OptimizerConfig, compute: torch.dtype
) -> Engine:
    """The engine ``name`` over ``stages``, which were built in ``compute``. Collective over all ranks.

    Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
    """
    return MAKERS[name](stages, shards, mesh, config, compute)


def hand_over(stages: Stages, shards: Shards, mesh: Mesh, config: TrainConfig) -> Engine:
    """``build_engine`` as ``config`` has it."""
    compute = NUMERICS[config.precision].dtype
    return build_engine(config.parallel.engine, stages, shards, mesh, config.optimizer, compute)


def load_library(name: EngineName, device: str) -> None:
    """Loads now what an engine on a type of device would load as it is built, which may take seconds: before a fork."""
    if name in DEEPSPEED:
        from training.partition import load

        load(device)


# Each engine's library is loaded with the first engine of its kind.


def _make_native(stages: Stages, shards: Shards, mesh: Mesh, config: OptimizerConfig, _: torch.dtype) -> Engine:
    from training.native import Native

    return Native(stages, shards, mesh, config)


def _make_fsdp2(stages: Stages, shards: Shards, mesh: Mesh, config: OptimizerConfig, compute: torch.dtype) -> Engine:
    from training.fsdp2 import Fsdp2, shard_stage

    for module in stages.values():
        module.to(torch.promote_types(compute, torch.float32))  # masters: fully_shard casts them as it gathers
        shard_stage(module, mesh, compute)
    return Fsdp2(stages, shards, mesh, config)


def _make_zero1(stages: Stages, shards: Shards, mesh: Mesh, config: OptimizerConfig, _: torch.dtype) -> Engine:
    from training.zero import DeepSpeed

    return DeepSpeed(stages, shards, mesh, config, zero=1)


def _make_zero2(stages: Stages, shards: Shards, mesh: Mesh, config: OptimizerConfig, _: torch.dtype) -> Engine:
    from training.zero import DeepSpeed

    return DeepSpeed(stages, shards, mesh, config, zero=2)


def _make_zero3(stages: Stages, shards: Shards, mesh: Mesh, config: OptimizerConfig, _: torch.dtype) -> Engine:
    from training.zero3 import Zero3

    return Zero3(stages, shards, mesh, config)


MAKERS: dict[EngineName, Maker] = {
    EngineName.native: _make_native,
    EngineName.fsdp2: _make_fsdp2,
    EngineName.zero1: _make_zero1,
    EngineName.zero2: _make_zero2,
    EngineName.zero3: _make_zero3,
}
