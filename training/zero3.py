"""Data parallelism by DeepSpeed's ZeRO-3 (arXiv 1910.02054), as its ``DeepSpeedZeroOptimizer_Stage3`` does it.

    weight [12]    | rank 0: 0 1 2 3 | rank 1: 4 5 6 7 | rank 2: 8 9 10 11 |     every parameter by itself, flat, padded

    forward        a module's own weights are gathered before its call and let go of after it
    backward       gathered again before the module's; its gradients go, a bucket at a time, to those who own them
    head           is used by the whole model, not by a call, and so is the embedding by MTP: external parameters of
                   the model, gathered from the beginning to the end of its forward, and of its backward
    step           ``torch.optim.AdamW`` updates what a rank owns; nothing is sent

Layouts of dp alone: every rank holds all parameters alike, and the group is one. DeepSpeed averages, so what it has
gathered is multiplied by the number of ranks when the step's last gradient is there. The norm, clipping and whether to
skip a step are decided here. Its own norm would be taken of one group, and skip what is not finite by its own rule.

Bytes of a rank for P elements, Q = P / ranks (and padding), c = bytes of a parameter:

    c Q weights + 4 Q masters + 8 Q moments + 4 Q gradients, which stay when the step is over

While a forward or backward runs, c bytes an element of the gathered modules and of the head come on top, and in the
backward a bucket of whole gradients (``optimizer.bucket_bytes``, or all if fewer); a step takes 4 Q more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parallel.doing import doing
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.agree import sum_over
from training.chunk import Chunk, fill
from training.config import OptimizerConfig
from training.engine import Hidden, State, Unrolling, Update, differentiate, name_parameters
from training.optimizer import match, sum_squares
from training.partition import connect, cut_chunks, set_steps, start_moments

Groups = list[dict[str, Any]]  # as torch's optimizers take them


class Zero3:
    """The engine for who trusts DeepSpeed's, and whose weights do not fit a rank."""

    def __init__(
        self, stages: Mapping[int, nn.Module], shards: Mapping[str, Shard], mesh: Mesh, config: OptimizerConfig
    ) -> None:
        """``stages``: the whole model. Its parameters become empty tensors that DeepSpeed fills when they are used.

        Raises ValueError for a pattern of ``optimizer.no_decay`` that matches no parameter.
        """
        self.config, self._mesh, self._shards = config, mesh, shards
        self._steps = 0  # updates applied
        (self._model,) = stages.values()
        named, _ = name_parameters(stages)
        self._names = {id(parameter): name for name, parameter in named.items()}
        groups = _group(named, config)
        self._group = mesh.holders(next(iter(shards.values())))
        connect(mesh.device)
        self._zero = _partition(self._model, groups, config, self._group)
        self._states = [
            start_moments(self._zero.optimizer, master) for master in self._zero.fp32_partitioned_groups_flat
        ]

    def begin(self) -> None:
        """Forgets the gradients."""
        self._zero.zero_grad()
        self._gradient.zero_()

    def forward(self, stage: int, *args: Any) -> Any:
        """Calls the model."""
        return self._model(*args)

    def unroll(self, stage: int, *args: Any) -> Unrolling:
        """Not to be had here: hooks of modules would see half of a forward."""
        raise AssertionError("pairs that overlap are for the native engine")

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """Adds the gradients of ``loss`` to the step's: their means over the ranks. Collective."""
        self._zero.clear_backward_seen_flag()
        self._zero.enter_backward()
        differentiate(loss, hidden)
        self._zero.overlapping_partition_gradients_reduce_epilogue()
        self._zero.backward_epilogue()
        self._zero.exit_backward()

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Not to be had here: DeepSpeed's hooks see what a backward computes."""
        raise AssertionError("weight gradients that are put off are for the native engine")

    def finishing(self, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        """Nothing: what starts inside of a backward, the library starts."""

    @torch.no_grad()
    def finished(self, stage: int) -> None:
        """Means become sums."""
        self._gradient.mul_(self._group.size())

    @doing("optimizer")
    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite."""
        # A parameter at a time, as the other engines: fewer elements are added in float32.
        grads = [grad for some in self._zero.averaged_gradients.values() for grad in some]
        norm = sum_over(sum_squares(grads, self._mesh.device), self._mesh).sqrt().item()
        if not (finite and math.isfinite(norm)):
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        if factor < 1.0:
            self._gradient.mul_(factor)
        self._steps += 1
        self._zero.set_lr(lr)
        self._zero.step()
        return Update(norm, factor, True)

    def settle(self) -> None:
        """Nothing is on its way."""

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""
        return State(self._steps, list(self._chunks()))

    def held(self) -> list[Chunk]:
        """The chunks of ``state``: no rank has what another one has."""
        return self.state().chunks

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, which covers at least what this rank owns; else raises ValueError."""
        if wrong := fill(self._chunks(), state.chunks):
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        self._steps = state.steps
        set_steps(self._zero.optimizer, state.steps)
        for group in range(len(self._states)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)

    @property
    def _gradient(self) -> Tensor:
        """Of all that this rank owns, in one flat tensor; padding is zero."""
        gradient: Tensor = self._zero.grad_partitions_flat_buffer
        return gradient

    def _chunks(self) -> Iterator[Chunk]:
        for parameters, state in zip(self._zero.fp16_groups, self._states, strict=True):
            at = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start, stop = (min(self._group.rank() * size + more, parameter.ds_numel) for more in (0, size))
                name = self._names[id(parameter)]
                part = {kind: tensor[at : at + size] for kind, tensor in state.items()}
                yield from cut_chunks(name, self._shards[name], range(start, stop), part)
                at += size


def _group(named: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Groups:
    """Parameters of one dtype that decay alike."""
    undecayed = match(config.no_decay, named)
    groups: dict[tuple[torch.dtype, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decay = 0.0 if name in undecayed else config.weight_decay
        groups.setdefault((parameter.dtype, decay), []).append(parameter)
    return [{"params": some, "weight_decay": decay} for (_, decay), some in groups.items()]


def _partition(model: nn.Module, groups: Groups, config: OptimizerConfig, group: torch.distributed.ProcessGroup) -> Any:
    """DeepSpeed's optimizer over ``model``, whose parameters it cuts over ``group`` and whose calls it watches."""
    import deepspeed
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.utils import defragment
    from deepspeed.utils.timer import NoopTimer

    class Stage3(DeepSpeedZeroOptimizer_Stage3):
        """With parameters of several dtypes, routers' being float32, and without a norm of its own."""

        def _get_parameter_partitions(self) -> list[Tensor]:
            return [parameter.ds_tensor for parameter in self.fp16_groups[0]]

        def _set_fp16_partitioned_groups_flat(self) -> None:
            self.lp_param_buffer = None  # all of one dtype; here every group has a buffer
            self.fp16_partitioned_groups_flat = [defragment([p.ds_tensor for p in some]) for some in self.fp16_groups]

        def _get_norm_groups(self) -> list[Tensor]:
            return [torch.zeros(())]

    names = {parameter: name for name, parameter in model.named_parameters()}
    elements = sum(parameter.numel() for parameter in names)
    dtype = next(model.parameters()).dtype
    # It refuses float64 where the processor has float16; it is what a model that is made inside of it would have.
    allowed = torch.float32 if dtype is torch.float64 else dtype
    deepspeed.zero.Init(model, group, mem_efficient_linear=False, dtype=allowed)
    zero = Stage3(
        model,
        torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True),
        names,
        NoopTimer(),
        None,
        contiguous_gradients=False,
        reduce_bucket_size=min(config.bucket_bytes // 4, elements),
        prefetch_bucket_size=0,
        max_reuse_distance=0,
        param_persistence_threshold=0,
        dp_process_group=group,
        gradient_accumulation_dtype=torch.float32,
        communication_data_type=torch.float32,
    )
    predicts_further = any(True for _ in model.get_submodule("mtp").children())
    for name in ("head.weight", "embedding.weight") if predicts_further else ("head.weight",):
        deepspeed.zero.register_external_parameter(model, model.get_parameter(name))
    return zero
