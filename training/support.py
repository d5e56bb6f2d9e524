"""What each engine cannot do, refused by name before anything is built. Standard library only."""

from importlib.util import find_spec

from model.config import Recompute
from parallel.config import EngineName
from training.config import MomentDtype, OptimizerConfig, Precision

DEEPSPEED = (EngineName.zero1, EngineName.zero2)


def check(engine: EngineName, precision: Precision, optimizer: OptimizerConfig, recompute: Recompute) -> None:
    """Raises ValueError if ``engine`` cannot train in ``precision``, run ``optimizer`` or ``recompute``."""
    if engine is EngineName.fsdp2 and recompute is not Recompute.none:
        raise ValueError(
            f"model.recompute={recompute} must be none with parallel.engine={engine}: fully_shard's units "
            "lie within what would be computed again"
        )
    if engine not in DEEPSPEED:
        return
    if find_spec("deepspeed") is None:
        raise ValueError(
            f"parallel.engine={engine} needs DeepSpeed, which is not installed; install deepspeed, or take "
            "parallel.engine=native, which does ZeRO-1 by itself"
        )
    if precision is Precision.fp64:
        raise ValueError(
            f"parallel.engine={engine} must be native or fsdp2 with precision={precision}: DeepSpeed casts master "
            "weights and gradients to float32"
        )
    if optimizer.moments is not MomentDtype.master:
        raise ValueError(
            f"optimizer.moments={optimizer.moments} must be master with parallel.engine={engine}: the AdamW that "
            "DeepSpeed steps keeps moments in the dtype of the masters"
        )
