"""Data parallelism by torch's fully_shard: weights, gradients and state of every block are sharded (ZeRO-3).

    block        over the replicas of its tp shard (dp, cp): gathered before its forward and before its backward
    its router   the same, in its own dtype
    its experts  over the holders of the same experts (edp)
    the rest     embedding, head, last norm, MTP's projections: one more unit

Parameters are masters, in float32 or wider; a unit is cast to the compute dtype as it is gathered, and its gradients
are summed in the masters' dtype after every backward. What tp has whole is summed over tp as well when its stage is
finished; what stages of several pipeline ranks have, an embedding, over those ranks with the last stage. Weight
gradients that are put off never reach fully_shard's hooks: schedules that split the backward are for the native engine.

Bytes of a rank for P elements held, Q = P / replicas (of experts: / holders): 4 Q masters + 4 Q gradients + 8 Q moments
(4 Q in bfloat16), and one or two units gathered, each c bytes an element to compute with and 4 for its gradients. What
tp has whole is cut over replicas only: as Q tells, more of it than native's.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Split

from model.block import Block
from parallel.doing import doing
from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard
from parallel.topology import Axis
from training.chunk import Chunk, fill
from training.config import MomentDtype, OptimizerConfig
from training.engine import Hidden, Share, State, Unrolling, Update, Waiting, differentiate, name_parameters
from training.optimizer import Part, match, sum_squares, update

UNEVEN = 16  # rows a rank, from which on one row more or less does not matter


class Owned(NamedTuple):
    """What this rank has of a parameter's state."""

    name: str
    parameter: nn.Parameter  # a DTensor
    shard: Shard
    dim: int  # along which the shard is cut
    first: int  # of its indices in that dim
    m: Tensor
    v: Tensor
    decay: float


def shard_stage(module: nn.Module, mesh: Mesh, compute: torch.dtype) -> None:
    """Puts fully_shard on every block of ``module``, whose parameters are masters; they become DTensors."""

    def over(axis: Axis) -> DeviceMesh:
        return DeviceMesh.from_group(mesh.group(axis, Traffic.data), mesh.device.type)

    masters = next(module.parameters()).dtype
    replicas, holders = over(Axis.replicas), over(Axis.edp)
    narrow = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=masters, cast_forward_inputs=False)
    wide = MixedPrecisionPolicy(cast_forward_inputs=False)

    def cut(unit: nn.Module, over: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        degree = over.size()
        fully_shard(unit, mesh=over, mp_policy=policy, shard_placement_fn=lambda p: Split(choose_dim(p.shape, degree)))

    for block in [block for block in module.modules() if isinstance(block, Block)]:
        if block.exchange is not None:
            cut(block.experts.routed, holders, narrow)
            assert block.attention.router is not None
            cut(block.attention.router, replicas, wide)
        cut(block, replicas, narrow)
    cut(module, replicas, narrow)
    for unit in module.modules():
        if isinstance(unit, FSDPModule):  # sums, where fully_shard would average
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def choose_dim(shape: Sequence[int], degree: int) -> int:
    """The dim of a parameter to cut in ``degree`` parts: of a fused weight [2, ...], the first dim would leave most
    ranks with nothing. fully_shard cuts only the first one unevenly.
    """
    if shape[0] >= UNEVEN * degree:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % degree == 0), 0)


class Fsdp2:
    """The engine for models whose weights do not fit a rank."""

    def __init__(
        self, stages: Mapping[int, nn.Module], shards: Mapping[str, Shard], mesh: Mesh, config: OptimizerConfig
    ) -> None:
        """``stages``: modules that ``shard_stage`` has seen. Raises ValueError for an ``optimizer.no_decay`` pattern
        that matches no parameter.
        """
        self.config, self._mesh, self._stages = config, mesh, stages
        self._steps = 0  # updates applied, the t of the bias correction
        named, users = name_parameters(stages)
        undecayed = match(config.no_decay, named)
        self._owned = [
            self._own(name, parameter, shards[name], 0.0 if name in undecayed else config.weight_decay)
            for name, parameter in named.items()
        ]
        self._shares = [Share(users[o.name], bool(o.shard.across), o) for o in self._owned]
        self._waiting = Waiting(stages)
        self._beside = {across: mesh.beside(across) for across in sorted({o.shard.across for o in self._owned} - {()})}

    def begin(self) -> None:
        """Forgets the gradients."""
        self._waiting.begin()
        for owned in self._owned:
            owned.parameter.grad = None

    def forward(self, stage: int, *args: Any) -> Any:
        """Calls the module of ``stage``."""
        return self._stages[stage](*args)

    def unroll(self, stage: int, *args: Any) -> Unrolling:
        """Not to be had here: hooks of modules would see half of a forward."""
        raise AssertionError("pairs that overlap are for the native engine")

    def backward(self, stage: int, loss: Tensor, hidden: Hidden = None) -> None:
        """Adds the gradients of ``loss`` and of ``hidden`` to the step's, summed over the holders at once."""
        differentiate(loss, hidden)

    def accumulate(self, parameter: nn.Parameter, grad: Tensor) -> None:
        """Not to be had here: see the head of this file."""
        raise AssertionError("weight gradients that are put off are for the native engine")

    def finishing(self, stage: int, coming: Sequence[Tensor] | None = None) -> None:
        """Nothing: what starts inside of a backward, the library starts."""

    @torch.no_grad()
    def finished(self, stage: int) -> None:
        """Sums over tp what every tp rank has whole, and over pipeline ranks what several of them hold."""
        ready = self._waiting.finish(stage, self._shares)
        if self._mesh.degree(Axis.tp) > 1:
            whole = [_local_grad(o) for o in ready if o.shard.placement.axis is None]
            _sum(whole, self._mesh.group(Axis.tp, Traffic.tensor))
        for across, group in self._beside.items():
            _sum([_local_grad(o) for o in ready if o.shard.across == across], group)

    @doing("optimizer")
    @torch.no_grad()
    def step(self, lr: float, finite: bool = True) -> Update:
        """Clips and updates, unless the gradient or, say the callers on all ranks, the loss is not finite."""
        norm = self._measure_norm()
        if not (finite and math.isfinite(norm)):
            return Update(norm, 1.0, False)
        factor = self.config.clip / norm if 0 < self.config.clip < norm else 1.0
        self._steps += 1
        for o in self._owned:
            master, grad, m, v = (tensor.view(-1) for tensor in (_local(o.parameter), _local_grad(o), o.m, o.v))
            update(Part(master, grad, m, v, None, o.decay), self.config, self._steps, lr, factor)
        return Update(norm, factor, True)

    def settle(self) -> None:
        """Nothing is on its way."""

    def state(self) -> State:
        """This rank's part of masters and moments: views, each of them on one rank only."""
        return State(self._steps, [chunk for o in self._owned if self._is_first(o) for chunk in _chunks(o)])

    def held(self) -> list[Chunk]:
        """The chunks of ``state``, and what tp ranks, or pipeline ranks, all have."""
        return [chunk for o in self._owned for chunk in _chunks(o)]

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Takes over what ``state`` gave, which covers at least this rank's part; else raises ValueError."""
        if wrong := fill(self.held(), state.chunks):
            raise ValueError(f"optimizer state does not fit the model: {', '.join(wrong[:5])}")
        self._steps = state.steps

    def _own(self, name: str, parameter: nn.Parameter, shard: Shard, decay: float) -> Owned:
        local = _local(parameter)
        narrow = self.config.moments is MomentDtype.bf16
        m, v = (torch.zeros_like(local, dtype=torch.bfloat16 if narrow else local.dtype) for _ in range(2))
        # fully_shard cuts into parts of one size, the last ones shorter or empty.
        axis = shard.placement.holders if shard.placement.axis is Axis.ep else Axis.replicas
        dim = choose_dim(shard.shape, self._mesh.degree(axis))
        size = -(-shard.shape[dim] // self._mesh.degree(axis))
        first = min(self._mesh.coordinate(axis) * size, shard.shape[dim])
        return Owned(name, parameter, shard, dim, first, m, v, decay)

    def _measure_norm(self) -> float:
        """Over all ranks, each element once."""
        grads = [_local_grad(o).view(-1) for o in self._owned if self._is_first(o)]
        total = sum_squares(grads, self._mesh.device)
        dist.all_reduce(total, group=self._mesh.group(Axis.world, Traffic.control))
        return total.sqrt().item()

    def _is_first(self, owned: Owned) -> bool:
        """Whether no rank before this one has the same: tp ranks do of what tp has whole, and so may pipeline ranks."""
        whole, across = owned.shard.placement.axis is None, owned.shard.across
        return not (whole and self._mesh.coordinate(Axis.tp)) and self._mesh.coordinate(Axis.pp) == min(
            across, default=self._mesh.coordinate(Axis.pp)
        )


def _sum(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Each becomes its sum over ``group``."""
    if not tensors:
        return
    joined = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(joined, group=group)
    for tensor, summed in zip(tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(summed.view_as(tensor))


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    local = parameter.to_local().detach()
    assert isinstance(local, Tensor)
    return local


def _local_grad(owned: Owned) -> Tensor:
    if owned.parameter.grad is None:  # it took no part: its moments decay all the same
        owned.parameter.grad = torch.zeros_like(owned.parameter)
    return _local(owned.parameter.grad)


def _chunks(owned: Owned) -> Iterator[Chunk]:
    shard = owned.shard
    offset = tuple(at + owned.first * (dim == owned.dim) for dim, at in enumerate(shard.offset))
    for part, tensor in (("master", _local(owned.parameter)), ("m", owned.m), ("v", owned.v)):
        yield Chunk(f"{part}/{owned.name}", shard.global_shape, offset, tensor)
