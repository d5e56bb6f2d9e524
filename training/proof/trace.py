"""What a run of a case leaves behind: once on the plain model, once on each rank of a layout.

Both runs take the same steps over the same global batches. The plain one reads a batch whole, in one forward; a rank
reads its own sequences of each micro-batch, and its sums are added over the ranks of its stage.
Shapes: L routed layers, N sequences, S tokens, K choices, E experts, D depth of multi-token prediction.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.batch import Batch, Denominators, Losses, count_labels
from model.build import build
from model.router import Router, Routing
from model.transformer import Transformer
from parallel.build import build_sharded
from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard
from parallel.topology import Axis
from training.config import OptimizerConfig
from training.engine import Chunk, Engine, Update
from training.native import Native
from training.optimizer import match
from training.proof.case import Case, disturb, draw_batch, list_tensors


class Step(NamedTuple):
    """What a step reports."""

    loss: Tensor  # the scalar that is differentiated
    sums: Tensor  # [1 + D] cross entropy
    aux: Tensor  # auxiliary loss before its weight
    load: Tensor  # [L, E] int64
    update: Update


class Trace(NamedTuple):
    """A run. Tensors by name are a rank's own parts; so is the routing."""

    initial: dict[str, Tensor]  # as built
    routing: Tensor  # [L, N, S, K] experts of the first step's tokens
    gradients: dict[str, Tensor]  # of the first step, before clipping, summed over holders without an engine
    moments: list[Chunk]  # the first moments after the first step: what the engine took for its gradients
    steps: list[Step]
    final: dict[str, Tensor]  # parameters and buffers after the last step


class Reference(NamedTuple):
    """The plain run."""

    trace: Trace
    start: dict[str, Tensor]  # the disturbed weights that every layout starts from


def vary_rate(case: Case, step: int) -> float:
    """Another rate each step: an update that is a step late would show."""
    return case.optimizer.lr * (1 + step)


def trace_plain(case: Case) -> Reference:
    """Takes the case's steps on the plain model, with torch's AdamW."""
    model, config = build(case.model, torch.float64, "cpu", case.seed), case.optimizer
    initial = copy_tensors(model)
    disturb(case, model)
    start, parameters = copy_tensors(model), dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        group_parameters(parameters, config), config.lr, (config.beta1, config.beta2), config.eps
    )
    steps, gradients, choices = [], {}, torch.empty(0)
    for step in range(case.steps):
        batch = draw_batch(case, step)
        with watch_routers(model) as seen:
            losses = model(batch, count_denominators([batch], case.model.mtp.depth))
        losses.total.backward()
        taken = {name: take_gradient(parameter) for name, parameter in parameters.items()}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in taken.values()))
        factor = config.clip / norm if 0 < config.clip < norm else 1.0
        for name, parameter in parameters.items():
            parameter.grad = taken[name] * factor
        for group in optimizer.param_groups:
            group["lr"] = vary_rate(case, step)
        optimizer.step()
        optimizer.zero_grad()
        model.update_biases(losses.load, case.model.moe.bias_speed)
        steps.append(Step(losses.total.detach(), losses.sums, losses.aux, losses.load, Update(norm, factor, True)))
        if step == 0:
            gradients, choices = taken, stack_choices(seen, case.sequences)
    return Reference(Trace(initial, choices, gradients, [], steps, copy_tensors(model)), start)


def group_parameters(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Those that decay and those that do not, as torch's optimizers take them."""
    kept = match(config.no_decay, parameters)
    return [
        {"params": [p for n, p in parameters.items() if n not in kept], "weight_decay": config.weight_decay},
        {"params": [p for n, p in parameters.items() if n in kept], "weight_decay": 0.0},
    ]


def trace_sharded(case: Case, mesh: Mesh, start: Mapping[str, Tensor]) -> tuple[Trace, dict[str, Shard]]:
    """Takes the same steps on this rank of a layout, from ``start``."""
    model, shards = build_sharded(case.model, torch.float64, mesh.device, case.seed, mesh)
    initial = copy_tensors(model)
    with torch.no_grad():
        for name, tensor in list_tensors(model).items():
            tensor.copy_(cut_out(start[name], shards.get(name)))
    routing, gradients = differentiate(case, mesh, model, shards)
    engine, steps, moments = Native({0: model}, shards, mesh, case.optimizer), [], []
    for step in range(case.steps):
        steps.append(take_step(case, mesh, model, engine, step))
        if step == 0:
            chunks = (chunk for chunk in engine.state().chunks if chunk.name.startswith("m/"))
            moments = [chunk._replace(tensor=chunk.tensor.clone()) for chunk in chunks]
    return Trace(initial, routing, gradients, moments, steps, copy_tensors(model)), shards


def take_step(case: Case, mesh: Mesh, model: Transformer, engine: Engine, step: int) -> Step:
    """One step as training takes it."""
    batches = share_batch(case, mesh, draw_batch(case, step))
    denominators = agree(batches, case, mesh)
    engine.begin()
    total: Losses | None = None
    for batch in batches:
        losses = engine.forward(0, batch, denominators)
        engine.backward(0, losses.total)
        here = Losses(*(tensor.detach() for tensor in losses))
        total = here if total is None else Losses(*(a + b for a, b in zip(total, here, strict=True)))
    assert total is not None
    engine.finished(0)
    update = engine.step(vary_rate(case, step))
    total = Losses(*(sum_over(tensor, mesh, Axis.stage) for tensor in total))
    model.update_biases(total.load, case.model.moe.bias_speed)
    return Step(*total, update)


def differentiate(
    case: Case, mesh: Mesh, model: Transformer, shards: Mapping[str, Shard]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Routing and gradients of the first step without an engine: each gradient is summed over its holders."""
    batches, routing = share_batch(case, mesh, draw_batch(case, 0)), []
    denominators = agree(batches, case, mesh)
    for batch in batches:
        with watch_routers(model) as seen:
            losses = model(batch, denominators)
        losses.total.backward()
        routing.append(stack_choices(seen, len(batch.ids)))
    gradients = {name: take_gradient(parameter) for name, parameter in model.named_parameters()}
    return torch.cat(routing, dim=1), reduce_parts(gradients, shards, mesh, dist.ReduceOp.SUM)


def share_batch(case: Case, mesh: Mesh, batch: Batch) -> list[Batch]:
    """This rank's micro-batches: its data-parallel coordinate's part of each stretch of the global batch."""
    places = place_sequences(case, mesh.coordinate(Axis.dp))
    return [
        Batch(batch.ids[place], batch.counted[place], None if batch.documents is None else batch.documents[place])
        for place in places
    ]


def place_sequences(case: Case, coordinate: int) -> list[slice]:
    """Where the sequences of each micro-batch of a data-parallel coordinate lie in the global batch."""
    size, stretch = case.micro_batch, case.micro_batch * case.topology.dp
    first = coordinate * size
    return [slice(i * stretch + first, i * stretch + first + size) for i in range(case.accumulation)]


def agree(batches: Sequence[Batch], case: Case, mesh: Mesh) -> Denominators:
    """The denominators of the global batch, from what each data-parallel rank counts."""
    own = count_denominators(batches, case.model.mtp.depth)
    counts = sum_over(torch.tensor([*own.tokens, own.sequences]), mesh, Axis.dp).tolist()
    return Denominators(tuple(counts[:-1]), counts[-1])


def count_denominators(batches: Sequence[Batch], depth: int) -> Denominators:
    """Counted labels at each depth, and sequences."""
    counts = [sum(column) for column in zip(*(count_labels(batch, depth) for batch in batches), strict=True)]
    return Denominators(tuple(map(float, counts)), float(sum(len(batch.ids) for batch in batches)))


def sum_over(tensor: Tensor, mesh: Mesh, axis: Axis) -> Tensor:
    """The sum of every rank's share."""
    total = tensor.clone()
    dist.all_reduce(total, group=mesh.group(axis, Traffic.control))
    return total


def reduce_parts(
    parts: Mapping[str, Tensor], shards: Mapping[str, Shard], mesh: Mesh, op: dist.ReduceOp.RedOpType
) -> dict[str, Tensor]:
    """Each part reduced over the ranks that hold it, all parts of the same holders in one message."""
    reduced: dict[str, Tensor] = {}
    for axis in sorted({shards[name].placement.holders for name in parts}):
        names = [name for name in parts if shards[name].placement.holders is axis]
        joined = torch.cat([parts[name].flatten() for name in names])
        dist.all_reduce(joined, op, mesh.group(axis, Traffic.data))
        split = joined.split([parts[name].numel() for name in names])
        reduced |= {name: part.view_as(parts[name]) for name, part in zip(names, split, strict=True)}
    return {name: reduced[name] for name in parts}


@contextmanager
def watch_routers(model: Transformer) -> Iterator[list[Tensor]]:
    """Collects the choices [T, K] of every router that runs inside; not those of recomputation, in the backward."""
    seen: list[Tensor] = []

    def keep(module: Router, inputs: object, routing: Routing) -> None:
        seen.append(routing.experts)

    handles = [router.register_forward_hook(keep) for router in model.routers()]
    yield seen
    for handle in handles:
        handle.remove()


def stack_choices(seen: Sequence[Tensor], sequences: int) -> Tensor:
    """[T, K] of each router -> [L, N, S, K]; a model without routers has none."""
    if not seen:
        return torch.zeros(0, sequences, 0, 0, dtype=torch.int64)
    return torch.stack([choices.unflatten(0, (sequences, -1)) for choices in seen])


def take_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient, zero where nothing flowed, and forgets it."""
    gradient, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if gradient is None else gradient


def copy_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every parameter and buffer by its global name."""
    return {name: tensor.clone() for name, tensor in list_tensors(model).items()}


def cut_out(whole: Tensor, shard: Shard | None) -> Tensor:
    """A rank's part of a plain tensor; of a buffer, which no shard describes, all of it."""
    return whole if shard is None else whole[shard.slices]
