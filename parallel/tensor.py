"""Tensor and sequence parallelism: heads, widths and vocabulary split over tp, everything between on sequence shards.

    shard [B, S/n, *] -- gather --> [B, S, *] -- columns of W, then rows of W' --> partial sums -- scatter --> shard

The gradient of a gather is a scatter (each rank saw the whole through its own columns: a partial gradient), and that of
a scatter is a gather (Megatron's g and g-bar, arXiv 2205.05198, section 4.2.2). So it is with their products: that of
gather and W is gy W and scatter, that of W' and scatter is gather and g W'; the whole that a gather gives on the way is
what the weight gradient reads (parallel/collective_matmul.py). What runs on shards has whole weights and partial
gradients, which the engine sums over tp as it does over dp.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from model.embedding import look_up
from model.linear import Deferred, Linear, differentiate_weight, matmul
from model.operator import operator, register_fake
from model.recompute import COMMUNICATION, Sizes, is_repeated
from model.sequence import Sequence
from parallel.collective_matmul import MATMULS, Operation, find_obstacle, gather, multiply, scatter
from parallel.collectives import all_reduce
from parallel.config import TensorOverlap
from parallel.mesh import Axis, Mesh


def _find(group: str) -> dist.ProcessGroup:
    # Operators take no groups, only names.
    return _resolve_process_group(GroupName(group))


@operator(f"{COMMUNICATION}::gather")
def _gather(shards: list[Tensor], group: str) -> list[Tensor]:
    """Each [B, s, *] -> [B, n s, *]."""
    return gather(shards, _find(group))


@register_fake(_gather)
def _(shards: list[Tensor], group: str) -> list[Tensor]:
    n = _find(group).size()
    return [shard.new_empty(shard.shape[0], n * shard.shape[1], *shard.shape[2:]) for shard in shards]


@operator(f"{COMMUNICATION}::scatter")
def _scatter(partials: list[Tensor], group: str) -> list[Tensor]:
    """Each [B, n s, *] -> the sum over ranks of [B, s, *]."""
    return scatter(partials, _find(group))


@register_fake(_scatter)
def _(partials: list[Tensor], group: str) -> list[Tensor]:
    n = _find(group).size()
    return [whole.new_empty(whole.shape[0], whole.shape[1] // n, *whole.shape[2:]) for whole in partials]


@operator(f"{COMMUNICATION}::gather_multiply")
def _gather_multiply(shards: list[Tensor], weights: list[Tensor], group: str, how: str) -> list[Tensor]:
    """Each [B, s, *] -> [B, n s, *]; then the products of the first ones by ``weights`` [I, O]."""
    return MATMULS[Operation(how)].gather(shards, weights, _find(group))


@register_fake(_gather_multiply)
def _(shards: list[Tensor], weights: list[Tensor], group: str, how: str) -> list[Tensor]:
    n = _find(group).size()
    wholes = [shard.new_empty(shard.shape[0], n * shard.shape[1], *shard.shape[2:]) for shard in shards]
    return wholes + [w.new_empty(*x.shape[:-1], w.shape[1]) for x, w in zip(wholes, weights, strict=False)]


@operator(f"{COMMUNICATION}::gather_and_fill", mutates=("products", "filled"))
def _gather_and_fill(
    shards: list[Tensor], weights: list[Tensor], products: list[Tensor], filled: Tensor, group: str, how: str
) -> list[Tensor]:
    """``_gather_multiply`` into ``products``, so that the wholes alone are what it gives, and what is kept of it."""
    wholes = MATMULS[Operation(how)].gather(shards, weights, _find(group), into=products)[: len(shards)]
    filled.fill_(True)
    return wholes


@operator("shoestring::fill", mutates=("products",))
def _fill(wholes: list[Tensor], weights: list[Tensor], products: list[Tensor], filled: Tensor) -> None:
    """The products, unless they are ``filled``: where a backward computes them again, the gather does not run again."""
    if not filled:
        for whole, weight, product in zip(wholes, weights, products, strict=False):
            multiply(whole.flatten(0, -2), weight, product.view(-1, weight.shape[1]))


@operator(f"{COMMUNICATION}::multiply_scatter")
def _multiply_scatter(wholes: list[Tensor], weights: list[Tensor], group: str, how: str) -> list[Tensor]:
    """Each of the products of the first ``wholes`` by ``weights`` [I, O], and of the others, as ``_scatter``."""
    return MATMULS[Operation(how)].scatter(wholes, weights, _find(group))


@register_fake(_multiply_scatter)
def _(wholes: list[Tensor], weights: list[Tensor], group: str, how: str) -> list[Tensor]:
    n = _find(group).size()
    ends = [weight.shape[1:] for weight in weights] + [whole.shape[2:] for whole in wholes[len(weights) :]]
    return [x.new_empty(x.shape[0], x.shape[1] // n, *end) for x, end in zip(wholes, ends, strict=True)]


@operator(f"{COMMUNICATION}::total")
def _total(counts: Tensor, group: str) -> Tensor:
    return all_reduce(counts, _find(group)).wait()


@register_fake(_total)
def _(counts: Tensor, group: str) -> Tensor:
    return torch.empty_like(counts)


class Gather(torch.autograd.Function):
    """Shards to wholes; gradients of wholes, partial on every rank, to sums of shards."""

    @staticmethod
    def forward(ctx, group: str, *shards: Tensor):  # type: ignore[no-untyped-def]
        ctx.group = group
        return tuple(_gather(list(shards), group))

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[no-untyped-def]
        return None, *_scatter(list(gradients), ctx.group)


class Scatter(torch.autograd.Function):
    """Partial wholes to shards of their sum; gradients of shards to wholes."""

    @staticmethod
    def forward(ctx, group: str, partial: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return _scatter([partial], group)[0]

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        return None, _gather([g], ctx.group)[0]


class GatherLinear(torch.autograd.Function):
    """``count`` shards to wholes, of which the first go through a weight each: those products, then the other wholes.

    Where a backward computes again what its forward did, products are ``kept`` with the wholes, or made from them anew.
    """

    @staticmethod
    def forward(ctx, group: str, how: str, kept: bool, deferred: Deferred, count: int, *tensors: Tensor):  # type: ignore[no-untyped-def]
        shards, weights = list(tensors[:count]), tensors[count:]
        matrices = [weight.flatten(0, -2).t() for weight in weights]
        if kept:
            both = _gather_multiply(shards, matrices, group, how)
            wholes, products = both[:count], both[count:]
        elif how == Operation.joined or torch.compiler.is_compiling():
            wholes = _gather(shards, group)
            products = [matmul(whole, matrix) for whole, matrix in zip(wholes, matrices, strict=False)]
        else:
            length = shards[0].shape[1] * _find(group).size()
            products = [
                shard.new_empty(shard.shape[0], length, matrix.shape[1])
                for shard, matrix in zip(shards, matrices, strict=False)
            ]
            filled = torch.zeros((), dtype=torch.bool)
            wholes = _gather_and_fill(shards, matrices, products, filled, group, how)
            _fill(wholes, matrices, products, filled)
        ctx.save_for_backward(*wholes[: len(weights)], *weights)
        ctx.group, ctx.how, ctx.deferred = group, how, deferred
        # The parameters themselves: see model/linear.py.
        ctx.parameters = [None if deferred is None else weight for weight in weights]
        return *products, *wholes[len(weights) :]

    @staticmethod
    def backward(ctx, *gradients: Tensor):  # type: ignore[no-untyped-def]
        saved, n = ctx.saved_tensors, len(ctx.parameters)
        wholes, weights = saved[:n], saved[n:]
        shards = _multiply_scatter(list(gradients), [weight.flatten(0, -2) for weight in weights], ctx.group, ctx.how)
        learned = [
            differentiate_weight(g, x, weight, ctx.deferred, parameter) if needed else None
            for g, x, weight, parameter, needed in zip(
                gradients[:n], wholes, weights, ctx.parameters, ctx.needs_input_grad[-n:], strict=True
            )
        ]
        return None, None, None, None, None, *shards, *learned


class LinearScatter(torch.autograd.Function):
    """Wholes through a weight, to shards of the sum over ranks."""

    @staticmethod
    def forward(ctx, group: str, how: str, deferred: Deferred, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.how, ctx.deferred = group, how, deferred
        ctx.parameter = None if deferred is None else weight
        return _multiply_scatter([x], [weight.flatten(0, -2).t()], group, how)[0]

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        whole, gx = _gather_multiply([g], [weight.flatten(0, -2)], ctx.group, ctx.how)
        needed = ctx.needs_input_grad[-1]
        gw = differentiate_weight(whole, x, weight, ctx.deferred, ctx.parameter) if needed else None
        return None, None, None, gx, gw


# By type of device, where the fused operators have nothing to run on: what was measured to cost nothing.
AUTO = {"cpu": Operation.blocks}


def choose_operation(wanted: TensorOverlap, mesh: Mesh) -> Operation:
    """How this run's exchanges and products go together; the same on every rank of a machine.

    Raises ValueError where ``parallel.overlap.tensor=fused`` has nothing to run on.
    """
    if wanted in (TensorOverlap.auto, TensorOverlap.fused):
        obstacle = find_obstacle(mesh.device, mesh.degree(Axis.tp), mesh.ranks_per_node)
        if not obstacle:
            return Operation.fused
        if wanted is TensorOverlap.auto:
            return AUTO.get(mesh.device.type, Operation.joined)
        raise ValueError(f"parallel.overlap.tensor=fused must be auto, joined or blocks here: {obstacle}")
    return Operation(wanted)


class ShardedSequence:
    """Every sequence is cut into one shard a rank of ``group``: see ``model.sequence.Sequence``.

    ``how``: as in parallel/collective_matmul.py. ``repeated``: sizes of products that a backward computes again, as
    ``model.recompute.list_repeated`` gives them.
    """

    def __init__(
        self, group: dist.ProcessGroup, how: Operation = Operation.joined, repeated: Sizes | None = ()
    ) -> None:
        self.degree, self.place, self.how, self._name = group.size(), group.rank(), how, group.group_name
        self._repeated = None if how is Operation.joined else repeated

    def gather(self, *shards: Tensor) -> tuple[Tensor, ...]:
        return tuple(Gather.apply(self._name, *shards))

    def scatter(self, partial: Tensor) -> Tensor:
        return Scatter.apply(self._name, partial)

    def gather_linear(
        self, shards: tuple[Tensor, ...], linears: tuple[Linear, ...], deferred: Deferred
    ) -> tuple[Tensor, ...]:
        if not all(linear.joins for linear in linears):
            wholes = self.gather(*shards)
            widened = [linear(x, deferred) for x, linear in zip(wholes, linears, strict=False)]
            return *widened, *wholes[len(linears) :]
        weights = [linear.weight for linear in linears]
        kept = not any(is_repeated((w.shape[-1], w.shape[:-1].numel()), self._repeated) for w in weights)
        return tuple(GatherLinear.apply(self._name, self.how, kept, deferred, len(shards), *shards, *weights))

    def linear_scatter(self, x: Tensor, linear: Linear, deferred: Deferred) -> Tensor:
        if not linear.joins:
            return self.scatter(linear(x, deferred))
        return LinearScatter.apply(self._name, self.how, deferred, x, linear.weight)

    def total(self, counts: Tensor) -> Tensor:
        return _total(counts, self._name)


class VocabularyLookup:
    """``model.embedding.Lookup`` in the rows of a table from ``first`` on: other tokens are zero, and ranks add up."""

    def __init__(self, first: int, sequence: Sequence) -> None:
        self.first, self.sequence = first, sequence

    def __call__(self, ids: Tensor, weight: Tensor) -> Tensor:
        """ids [B, S] -> this rank's shard [B, S / n, H]."""
        rows = ids - self.first
        mine = (rows >= 0) & (rows < len(weight))
        return self.sequence.scatter(look_up(rows.where(mine, 0), weight) * mine[..., None])
