"""One optimizer of DeepSpeed's, ``DeepSpeedZeroOptimizer``: parameters of one dtype that the same ranks hold alike.

    | decayed parameters, end to end ............ | the others ............... |
    | rank 0     | rank 1     | rank 2     |      | rank 0 | rank 1 | rank 2 |      flat ranges of equal size, padded

It sums and cuts, ``torch.optim.AdamW`` updates a rank's ranges, and it gathers the new weights. Its own norm and
clipping are off: they know of the ranks of one group only, and add 1e-6 to the norm. Attributes of it that are used
here are those of its version 0.19, which pyproject.toml pins.
"""

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parallel.placement import Shard
from training.chunk import Chunk
from training.config import OptimizerConfig
from training.pieces import cut_range
from training.slab import Entry


def load(device: str) -> None:
    """Loads DeepSpeed for a type of device, which takes seconds, without a word."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what torch and DeepSpeed use of each other and of Python
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # loads the compiler, as the first sum of gradients would
        import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
        from deepspeed.utils import logger

    logger.setLevel("WARNING")


def connect(device: torch.device) -> None:
    """Lets DeepSpeed talk through torch's process groups."""
    load(device.type)
    import deepspeed

    # What torch now calls all_gather_single and reduce_scatter_single; DeepSpeed uses the former names.
    warnings.filterwarnings("ignore", ".*(all_gather_into|reduce_scatter)_tensor.*deprecated", FutureWarning)
    # It would compile collectives over shared memory at its first start on a CPU. They are for inference.
    deepspeed.ops.__compatible_ops__ = {}
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # stage 3 reads it
    deepspeed.init_distributed(verbose=False)


class Partition:
    """The optimizer, and what this rank owns of it."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        shards: Mapping[str, Shard],
        group: torch.distributed.ProcessGroup,
        config: OptimizerConfig,
        undecayed: set[str],
        zero: int,
    ) -> None:
        """``group`` holds the same parts of ``parameters``; ``zero`` is 1 or 2."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer

        entries = {id(parameter): Entry(name, parameter, shards[name]) for name, parameter in parameters.items()}
        decays = ((False, config.weight_decay), (True, 0.0))
        groups = [
            {"params": some, "weight_decay": decay}
            for kept, decay in decays
            if (some := [parameter for name, parameter in parameters.items() if (name in undecayed) == kept])
        ]
        self._scattered = zero == 2
        self._zero: Any = DeepSpeedZeroOptimizer(
            torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True),
            {parameter: name for name, parameter in parameters.items()},
            NoopTimer(),
            None,
            reduce_bucket_size=min(config.bucket_bytes // 4, sum(p.numel() for p in parameters.values())),
            dp_process_group=group,
            partition_grads=self._scattered,
            gradient_average=False,  # sums
            communication_data_type=torch.float32,
            gradient_accumulation_dtype=torch.float32,
            check_grad_overflow=False,
            compute_grad_norm=False,
        )
        self._owned = [[entries[id(parameter)] for parameter in some] for some in self._zero.params_in_partition]
        self._states: list[dict[str, Tensor]] = []
        for master in self._zero.single_partition_of_fp32_groups:
            self._states.append(start_moments(self._zero.optimizer, master))

    def begin(self) -> None:
        """Forgets the gradients."""
        self._zero.zero_grad()
        for group in range(len(self._owned)):
            self._zero.averaged_gradients[group] = self._zero.all_grad_tensors[group] = None

    def enter_backward(self) -> None:
        """A backward begins."""
        self._zero.clear_backward_seen_flag()
        self._zero.set_gradient_accumulation_boundary(False)  # whether it is the last, only ``reduce`` will say
        self._zero.enter_backward()

    def leave_backward(self) -> None:
        """It is over."""
        if self._scattered:
            self._zero.overlapping_partition_gradients_reduce_epilogue()
        self._zero.backward_epilogue()
        self._zero.exit_backward()
        if not self._scattered:
            self._zero._release_ipg_buffers()  # a bucket that only ``reduce`` will fill

    def reduce(self) -> None:
        """The step's last gradient is there. Collective in stage 1."""
        if self._scattered:
            self._zero.finalize_gradient_accumulation_boundary()
            return
        for parameter in (parameter for group in self._zero.bit16_groups for parameter in group):
            if self._zero.get_gradient_for_reduction(parameter) is None:  # other holders may have a gradient
                parameter.grad = torch.zeros_like(parameter)
        self._zero.backward_epilogue()
        self._zero.setup_buckets()
        self._zero.set_gradient_accumulation_boundary(True)
        self._zero.reduce_gradients()
        for others in self._zero.params_not_in_partition:
            self._zero.free_grad_in_param_list(others)

    def grads(self) -> Iterator[Tensor]:
        """The sums that this rank owns: flat views that may be changed."""
        return (grad.view(-1) for group in range(len(self._owned)) for grad in self._zero.averaged_gradients[group])

    def step(self, lr: float) -> None:
        """Updates the owned part and sends it to all holders. Collective."""
        self._zero.set_lr(lr)
        self._zero.step()

    def publish(self, steps: int) -> None:
        """Masters and moments are those after ``steps`` updates: sets the weights from them. Collective."""
        set_steps(self._zero.optimizer, steps)
        self._zero.update_lp_params()

    def chunks(self) -> Iterator[Chunk]:
        """Masters and moments as rectangles of the whole parameters."""
        for owned, state, first in zip(self._owned, self._states, self._zero.first_offset, strict=True):
            at, end, start = 0, len(state["master"]), first
            for name, parameter, shard in owned:
                part = range(start, min(parameter.numel(), start + end - at))
                yield from cut_chunks(name, shard, part, {kind: tensor[at:] for kind, tensor in state.items()})
                at, start = at + len(part), 0


def start_moments(optimizer: torch.optim.Optimizer, master: Tensor) -> dict[str, Tensor]:
    """Moments of a flat master, as AdamW would make at its first step: here they can be loaded and saved before it.

    Returns what chunks are cut from."""
    moments = {name: torch.zeros_like(master).detach() for name in ("exp_avg", "exp_avg_sq")}
    steps = torch.zeros((), dtype=torch.float32, device=master.device)
    optimizer.state[master] = {"step": steps, **moments}
    return {"master": master.detach(), "m": moments["exp_avg"], "v": moments["exp_avg_sq"]}


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """So many updates have been applied."""
    for state in optimizer.state.values():
        state["step"].fill_(steps)


def cut_chunks(name: str, shard: Shard, part: range, state: Mapping[str, Tensor]) -> Iterator[Chunk]:
    """``state`` begins with the elements ``part`` of a parameter: as rectangles of the whole one."""
    at = 0
    for rectangle in cut_range(shard.shape, part):
        size = math.prod(rectangle.shape)
        offset = tuple(map(sum, zip(shard.offset, rectangle.offset, strict=True)))
        for kind, tensor in state.items():
            view = tensor[at : at + size].view(rectangle.shape)
            yield Chunk(f"{kind}/{name}", shard.global_shape, offset, view)
        at += size
