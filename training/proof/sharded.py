"""A case's steps on one rank of a layout: built, fed, reduced and updated by what training itself uses."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from model.transformer import Transformer
from parallel.build import build_sharded
from parallel.mesh import Mesh
from parallel.placement import Shard
from training import microbatches
from training.agree import sum_over
from training.engine import Engine
from training.engines import build_engine
from training.proof.case import Case, list_tensors, place_sequences, share_batch
from training.proof.parts import Parts, join_chunks, reduce_parts
from training.proof.trace import Step, Trace, copy_tensors, stack_choices, take_gradient, vary_rate, watch_routers


def trace_sharded(case: Case, mesh: Mesh, start: Parts) -> tuple[Trace, dict[str, Shard]]:
    """Takes the steps on this rank, from ``start``. Collective over all ranks."""
    model, shards = build_sharded(case.model, torch.float64, mesh.device, case.seed, mesh)
    initial = copy_tensors(model)
    with torch.no_grad():
        for name, tensor in list_tensors(model).items():
            tensor.copy_(start[name][shards[name].slices] if name in shards else start[name])
    trace = differentiate(case, mesh, model, shards)._replace(initial=initial)
    engine = build_engine(case.engine, model, shards, mesh, case.optimizer, torch.float64)
    for step in range(case.steps):
        trace.steps.append(take_step(case, mesh, model, engine, step))
        if step == 0:
            chunks = (chunk for chunk in engine.state().chunks if chunk.name.startswith("m/"))
            trace.moments.extend(chunk._replace(tensor=chunk.tensor.clone()) for chunk in chunks)
    final = copy_tensors(model)
    if any(isinstance(tensor, DTensor) for tensor in final.values()):  # the engine shards what the layout left whole
        masters = [chunk for chunk in engine.state().chunks if chunk.name.startswith("master/")]
        final |= join_chunks(masters, shards, mesh)
    return trace._replace(final=final), shards


def take_step(case: Case, mesh: Mesh, model: Transformer, engine: Engine, step: int) -> Step:
    """One step as training takes it."""
    batches = share_batch(case, mesh, step)
    denominators = microbatches.count_denominators(batches, case.model.mtp.depth, mesh)
    engine.begin()
    share = microbatches.accumulate(engine, batches, denominators, stop=lambda: False)
    assert share is not None
    totals = microbatches.total_over_ranks(share, mesh)
    update = engine.step(vary_rate(case, step))
    model.update_biases(totals.load, case.model.moe.bias_speed)
    return Step(*totals, update)


def differentiate(case: Case, mesh: Mesh, model: Transformer, shards: dict[str, Shard]) -> Trace:
    """The first step's forward and backward without an engine: each gradient is summed over its holders."""
    batches, routing, loss = share_batch(case, mesh, 0), [], torch.zeros((), dtype=torch.float64)
    denominators = microbatches.count_denominators(batches, case.model.mtp.depth, mesh)
    for batch in batches:
        with watch_routers(model) as seen:
            losses = model(batch, denominators)
        losses.total.backward()
        loss += losses.total.detach()
        routing.append(stack_choices(seen, len(batch.ids)))
    gradients = {name: take_gradient(parameter) for name, parameter in model.named_parameters()}
    gradients = reduce_parts(gradients, shards, mesh, dist.ReduceOp.SUM)
    read = torch.zeros(case.sequences, dtype=torch.int64)
    for place in place_sequences(case, mesh, 0):
        read[place] += 1
    others = case.topology.stage_size // case.topology.dp  # ranks that read the same sequences
    return Trace(
        {}, sum_over(read, mesh) // others, torch.cat(routing, dim=1), sum_over(loss, mesh), gradients, [], [], {}
    )
