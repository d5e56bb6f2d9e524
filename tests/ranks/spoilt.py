"""Faults of the libraries that some engines stand on: what they would do unless told otherwise, and what is lost there.

Each takes the place of something for as long as a test's patch lasts; a proof must notice.
"""

from typing import Any

import pytest
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from training import fsdp2


def average_units(patch: pytest.MonkeyPatch) -> None:
    """fully_shard divides its sums by the number of ranks, as it does unless told otherwise."""
    patch.setattr(fsdp2, "FSDPModule", type(None))


def average_partitions(patch: pytest.MonkeyPatch) -> None:
    """DeepSpeed does, as it does unless told otherwise."""
    from deepspeed.runtime.zero import stage_1_and_2

    summing, told = stage_1_and_2.DeepSpeedZeroOptimizer, {"gradient_average": True}
    patch.setattr(stage_1_and_2, "DeepSpeedZeroOptimizer", lambda *a, **options: summing(*a, **{**options, **told}))


def leave_means(patch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed's ZeRO-3 has averaged is taken for the sum."""
    from training.zero3 import Zero3

    patch.setattr(Zero3, "finished", lambda self, stage: None)


def lose_the_others_weights(patch: pytest.MonkeyPatch) -> None:
    """What ZeRO-3 gathers before it is used does not arrive: what other ranks have of it is zero."""
    from deepspeed.runtime.zero import partition_parameters

    def gather(own: Tensor, everyone: Tensor, group: ProcessGroup) -> Any:
        handle = whole(own, everyone, group)
        handle.wait()
        for rank, part in enumerate(everyone.chunk(group.size())):
            if rank != group.rank():
                part.zero_()
        return handle

    whole = partition_parameters._dist_allgather_fn
    patch.setattr(partition_parameters, "_dist_allgather_fn", gather)


def lose_the_others_parts(patch: pytest.MonkeyPatch) -> None:
    """What other ranks have of a DTensor does not arrive."""
    patch.setattr(DTensor, "full_tensor", lambda self: self.to_local().new_zeros(self.shape))


SPOILT = {
    "zero1": average_partitions,
    "zero3": leave_means,
    "zero3 gathers": lose_the_others_weights,
    "fsdp2": average_units,
    "gather": lose_the_others_parts,
}
