"""A case's steps on one rank of a layout: built, fed, reduced and updated by what training itself uses."""

import torch
from torch.distributed.tensor import DTensor

from parallel.build import build_sharded
from parallel.mesh import Mesh
from parallel.placement import Shard
from training.engines import build_engine
from training.proof.case import Case, list_tensors
from training.proof.parts import Parts, join_chunks
from training.proof.steps import shuffle_experts, take_step
from training.proof.trace import Trace, copy_tensors
from training.proof.unaided import differentiate


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
        if case.rebalance:
            shuffle_experts(case, model, shards, engine, mesh, step)
    final = copy_tensors(model)
    if any(isinstance(tensor, DTensor) for tensor in final.values()):  # the engine shards what the layout left whole
        masters = [chunk for chunk in engine.state().chunks if chunk.name.startswith("master/")]
        final |= join_chunks(masters, shards, mesh)
    return trace._replace(final=final), shards
