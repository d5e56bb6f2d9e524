"""A case's steps on one rank of a layout: built, fed, reduced and updated by what training itself uses."""

import torch

from model.precision import Numerics
from parallel.build import Shards, build_stages
from parallel.mesh import Mesh
from training.engines import build_engine
from training.gather import complete, find_tensors, name_tensors
from training.pipeline import Runner, shape_activations
from training.proof.case import Case
from training.proof.parts import Parts
from training.proof.steps import shuffle_experts, take_step
from training.proof.trace import Trace, copy_tensors
from training.proof.unaided import trace_unaided


def trace_sharded(case: Case, mesh: Mesh, start: Parts) -> tuple[Trace, Shards]:
    """Takes the steps on this rank, from ``start``. Collective over all ranks."""
    pipeline = case.stages
    mesh.share(pipeline.shared(case.model))
    stages, shards = build_stages(
        case.model, Numerics(torch.float64, case.recipe), case.seed, mesh, pipeline, case.overlap
    )
    runner = Runner(case.parallel, pipeline, shape_activations(case.model, case.length, torch.float64, mesh), mesh)
    initial = copy_tensors(stages.values())
    with torch.no_grad():
        for name, tensor in name_tensors(stages.values()).items():
            tensor.copy_(start[name][shards[name].slices] if name in shards else start[name])
    trace = trace_unaided(case, mesh, stages, shards, runner)._replace(initial=initial)
    engine = build_engine(case.engine, stages, shards, mesh, case.optimizer, torch.float64)
    for step in range(case.steps):
        trace.steps.append(take_step(case, mesh, stages, engine, runner, step))
        if step == 0:
            chunks = (chunk for chunk in engine.state().chunks if chunk.name.startswith("m/"))
            trace.moments.extend(chunk._replace(tensor=chunk.tensor.clone()) for chunk in chunks)
        if case.rebalance:
            shuffle_experts(case, stages, shards, engine, mesh, step)
    engine.settle()
    final = {name: complete(tensor).clone() for name, tensor in find_tensors(stages.values()).items()}
    return trace._replace(final=final), shards
