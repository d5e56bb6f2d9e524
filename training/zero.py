"""Data parallelism by DeepSpeed: ZeRO-1 and ZeRO-2 (arXiv 1910.02054), as its ``DeepSpeedZeroOptimizer`` does them.

    holders     every rank of the stage      norms, routers
                ranks of the same tp place   what tp splits
                holders of the same experts  experts
    of each, and of each dtype, one optimizer of DeepSpeed's, with weight decay and without as its two groups

    stage 1     gradients add up on every rank; ``finished`` sums them over the holders
    stage 2     every backward sums its gradients over the holders as they come, and keeps the owned part

An optimizer sees only parameters that all ranks of its group hold alike, so that the ranks fill their buckets alike,
whatever tp cuts unevenly and wherever experts are folded over tp. DeepSpeed sums, cuts into owned pieces, steps
``torch.optim.AdamW`` on them and gathers. Sums stay sums (``gradient_average=False``). The norm, clipping and whether to
skip a step are decided here, on all owned pieces of all ranks.

Weight gradients that are put off never reach DeepSpeed's hooks: schedules that split the backward are for the native
engine.

Bytes of a rank for P elements held, Q = P / holders (and the rest of a division), c = bytes of a parameter:

    c P weights + 4 Q masters + 8 Q moments, gradients 4 P in stage 1 and 4 Q in stage 2

and for a step 4 Q more and, of each optimizer, a bucket (``optimizer.bucket_bytes``, or all its gradients if fewer).
Stage 2 keeps all of a parameter of which a rank owns a part while parameters are float32, and c bytes an element of
them beside the 4 Q while a backward runs if they are bfloat16.
"""

import math
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard
from parallel.topology import Axis
from training.chunk import Chunk, copy_into
from training.config import OptimizerConfig
from training.engine import State, Update
from training.optimizer import match, sum_squares
from training.pieces import Rectangle, find_rectangles


class Entry(NamedTuple):
    """A parameter, its global name, and which part of the whole this rank holds."""

    name: str
    parameter: nn.Parameter
    shard: Shard


class Partition(NamedTuple):
    """What this rank owns of a group of parameters: flat tensors, and where in them each parameter lies."""

    tensors: Mapping[str, Tensor]  # master, m, v
    steps: Tensor  # the t of AdamW's bias correction
    entries: Sequence[Entry]
    first: int  # the first element owned of the first entry


class DeepSpeed:
    """The engine for who trusts DeepSpeed's."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        shards: Mapping[str, Shard],
        mesh: Mesh,
        config: OptimizerConfig,
        zero: int,
    ) -> None:
        """``zero`` is 1 or 2. The parameters' storage moves into DeepSpeed's buffers.

        Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
        """
        self.config, self._mesh, self._stages, self._partitioned = config, mesh, stages, zero == 2
        self._steps = 0  # updates applied
        names = [name for module in stages.values() for name, _ in module.named_parameters()]
        undecayed = match(config.no_decay, names)
        self._optimizers: dict[int, list[Any]] = {}
        self._partitions: list[Partition] = []
        _connect(mesh)
        for stage, module in stages.items():
            alike: defaultdict[tuple[Axis, torch.dtype], list[Entry]] = defaultdict(list)
            for name, parameter in module.named_parameters():
                alike[shards[name].placement.holders, parameter.dtype].append(Entry(name, parameter, shards[name]))
            self._optimizers[stage] = [
                self._make(entries, mesh.group(holders, Traffic.data), undecayed)
                for (holders, _), entries in alike.items()
            ]

    def begin(self) -> None:
        """Forgets the gradients."""
        for optimizer in self._all():
            optimizer.zero_grad()
            for group in range(len(optimizer.bit16_groups)):
                optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None

    def forward(self, stage: int, *args: Any) -> Any:
        """Calls the module of ``stage``."""
        return self._stages[stage](*args)

    def backward(self, stage: int, loss: Tensor) -> None:
        """Adds the gradients of ``loss`` to the step's; in stage 2 summed over the holders at once."""
        for optimizer in self._optimizers[stage]:
            optimizer.clear_backward_seen_flag()
            optimizer.set_gradient_accumulation_boundary(False)  # which backward is the last, ``finished`` says
            optimizer.enter_backward()
        loss.backward()
        for optimizer in self._optimizers[stage]:
            if self._partitioned:
                optimizer.overlapping_partition_gradients_reduce_epilogue()
            optimizer.backward_epilogue()
            optimizer.exit_backward()

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Not to be had here: see the head of this file."""
        raise AssertionError("weight gradients that are put off are for the native engine")

    @torch.no_grad()
    def finished(self, stage: int) -> None:
        """Stage 1 sums the gradients over the holders."""
        for optimizer in self._optimizers[stage]:
            if self._partitioned:
                optimizer.finalize_gradient_accumulation_boundary()
                continue
            for parameter in (parameter for group in optimizer.bit16_groups for parameter in group):
                if optimizer.get_gradient_for_reduction(parameter) is None:  # other holders may have a gradient
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.backward_epilogue()
            optimizer.setup_buckets()
            optimizer.set_gradient_accumulation_boundary(True)
            optimizer.reduce_gradients()

    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite."""
        grads = [
            grad for z in self._all() for group in range(len(z.bit16_groups)) for grad in z.averaged_gradients[group]
        ]
        total = sum_squares([grad.flatten() for grad in grads], self._mesh.device)
        dist.all_reduce(total, group=self._mesh.group(Axis.world, Traffic.control))
        norm = total.sqrt().item()
        if not (finite and math.isfinite(norm)):
            self.begin()
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        if factor < 1.0:
            for grad in grads:
                grad.mul_(factor)
        self._steps += 1
        for optimizer in self._all():
            optimizer.set_lr(lr)
            optimizer.step()
        return Update(norm, factor, True)

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""
        return State(self._steps, [chunk for partition in self._partitions for chunk in _chunks(partition)])

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, which covers at least what this rank owns; else raises ValueError."""
        given: defaultdict[str, list[Chunk]] = defaultdict(list)
        for chunk in state.chunks:
            given[chunk.name].append(chunk)
        wrong = sorted({own.name for own in self.state().chunks if not copy_into(own, given[own.name])})
        if wrong:
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        self._steps = state.steps
        for partition in self._partitions:
            partition.steps.fill_(state.steps)
        for optimizer in self._all():
            optimizer.update_lp_params()

    def _all(self) -> list[Any]:
        return [optimizer for optimizers in self._optimizers.values() for optimizer in optimizers]

    def _make(self, entries: Sequence[Entry], group: dist.ProcessGroup, undecayed: set[str]) -> Any:
        """DeepSpeed's optimizer for parameters of one dtype that the ranks of ``group`` hold alike."""
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
        from deepspeed.utils.timer import NoopTimer

        decays = {
            self.config.weight_decay: [entry for entry in entries if entry.name not in undecayed],
            0.0: [entry for entry in entries if entry.name in undecayed],
        }
        groups = [
            {"params": [entry.parameter for entry in some], "weight_decay": decay}
            for decay, some in decays.items()
            if some
        ]
        betas = self.config.beta1, self.config.beta2
        largest = sum(entry.parameter.numel() for entry in entries)
        optimizer = DeepSpeedZeroOptimizer(
            torch.optim.AdamW(groups, betas=betas, eps=self.config.eps, fused=True),
            {entry.parameter: entry.name for entry in entries},
            NoopTimer(),
            None,
            reduce_bucket_size=min(self.config.bucket_bytes // 4, largest),
            dp_process_group=group,
            partition_grads=self._partitioned,
            gradient_average=False,
            communication_data_type=torch.float32,
            gradient_accumulation_dtype=torch.float32,
            check_grad_overflow=False,
            compute_grad_norm=False,
        )
        by_parameter = {id(entry.parameter): entry for entry in entries}
        for number, master in enumerate(optimizer.single_partition_of_fp32_groups):
            # As AdamW would at its first step; here they can be loaded and saved before it.
            m, v, steps = torch.zeros_like(master), torch.zeros_like(master), torch.zeros((), device=master.device)
            optimizer.optimizer.state[master] = {"step": steps, "exp_avg": m.detach(), "exp_avg_sq": v.detach()}
            owned = [by_parameter[id(parameter)] for parameter in optimizer.params_in_partition[number]]
            tensors = {"master": master.detach(), "m": m.detach(), "v": v.detach()}
            self._partitions.append(Partition(tensors, steps, owned, optimizer.first_offset[number]))
        return optimizer


def _connect(mesh: Mesh) -> None:
    """Lets DeepSpeed talk through torch's process groups."""
    os.environ.setdefault("DS_ACCELERATOR", mesh.device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what torch and DeepSpeed use of each other and of Python
        import deepspeed
        import deepspeed.runtime.zero.muon.muon_optimizer  # loads the compiler, as the first sum of gradients would
        from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # What torch now calls all_gather_single; DeepSpeed uses the former name.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.*deprecated", FutureWarning)
    # It would compile its own shared-memory collectives at the first start on a CPU. They are for inference.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(verbose=False)


def _chunks(partition: Partition) -> Iterator[Chunk]:
    """Masters and moments as rectangles of the whole parameters."""
    at, end = 0, len(partition.tensors["master"])
    for number, (name, parameter, shard) in enumerate(partition.entries):
        start = 0 if number else partition.first
        part = range(start, min(parameter.numel(), start + end - at))
        for rectangle in _cut(shard.shape, part):
            size = math.prod(rectangle.shape)
            offset = tuple(map(sum, zip(shard.offset, rectangle.offset, strict=True)))
            for kind, tensor in partition.tensors.items():
                view = tensor[at : at + size].view(rectangle.shape)
                yield Chunk(f"{kind}/{name}", shard.global_shape, offset, view)
            at += size


def _cut(shape: Sequence[int], part: range) -> Iterator[Rectangle]:
    """Elements ``part`` of a tensor of ``shape``, in its own order, as rectangles: DeepSpeed cuts inside rows."""
    row = shape[-1]
    cuts = {part.start, min(-(-part.start // row) * row, part.stop), max(part.stop // row * row, part.start), part.stop}
    for start, stop in pairwise(sorted(cuts)):
        if start % row == 0 == stop % row:
            yield from find_rectangles(shape, range(start, stop))
            continue
        place, before = start // row, []
        for size in reversed(shape[:-1]):
            before.append(place % size)
            place //= size
        yield Rectangle((*reversed(before), start % row), (*(1 for _ in before), stop - start))
