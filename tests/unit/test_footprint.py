"""What a rank holds, counted without building a model, against the real model's parameters and the plan's rows."""

import math
from dataclasses import replace

import pytest
import torch

from configs.schema import RunConfig
from launcher.compose import Composer
from model.build import outline
from parallel.config import EngineName
from parallel.pipeline.plan import divide_model
from parallel.pipeline.stages import Pipeline, whole
from parallel.placement import Placement, cut, holders, place
from parallel.plan import plan_transformer
from parallel.topology import Axis, Topology
from training.arrange import take_schedule
from training.footprint import FORMULAS, estimate

LAYOUTS = {
    "one": (),
    "dp": ("parallel.dp=4",),
    "folded": ("parallel.dp=2", "parallel.tp=2", "parallel.ep=4"),
    "pipeline": ("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "run.micro_batch=1"),
    "virtual": ("parallel.pp=2", "parallel.dp=2", "parallel.pipeline.virtual=2", "run.micro_batch=1"),
    "tied": ("model.tied=true", "parallel.tp=2", "parallel.dp=1"),
    "grouped": (
        *("model.attention.kv_rank=null", "model.attention.q_rank=null", "model.attention.kv_heads=2"),
        *("model.attention.qk_norm=true", "model.attention.bias=true", "model.moe.every=2", "parallel.tp=2"),
    ),
    "dense": ("model.moe.experts=0", "model.mtp.depth=0", "parallel.dp=2", "model.attention.q_rank=null"),
}


def compose(*words: str) -> tuple[RunConfig, Topology, Pipeline]:
    config = Composer().compose(words)[0]
    p = config.parallel
    topology = Topology(pp=p.pp, dp=p.dp or 1, cp=p.cp, tp=p.tp, ep=p.ep)
    pipeline = (
        whole(config.model)
        if topology.pp == 1
        else divide_model(config.parallel, config.model, take_schedule(config, topology.dp))
    )
    return config, topology, pipeline


def add_up(config: RunConfig, topology: Topology, pipeline: Pipeline, place_of: int) -> float:
    """The same from every parameter of the real model, of the first rank of pipeline rank ``place_of``."""
    shapes = {name: p.shape for name, p in outline(config.model, torch.bfloat16).named_parameters()}
    placements = place(plan_transformer(config.model), shapes)
    rank, total = place_of * topology.stage_size, 0.0
    for name in pipeline.names_of(place_of, shapes, config.model):
        placement: Placement = placements[name]
        across = pipeline.across(name, config.model)
        shard = cut(shapes[name], placement, topology, rank)
        count = len(holders(placement, topology, rank, across if len(across) > 1 else ()))
        if config.parallel.engine is EngineName.fsdp2 and placement.axis is not Axis.ep:
            count = topology.degree(Axis.replicas)
        wide = name.endswith("router.weight")
        total += math.prod(shard.shape) * sum(FORMULAS[config.parallel.engine](4 if wide else 2, wide, 8, count))
    return total


# What stages share is counted for native alone.
CASES = [
    (name, engine)
    for name, words in LAYOUTS.items()
    for engine in ("native", "fsdp2")
    if engine == "native" or not any(word.startswith("parallel.pp=") for word in words)
]


@pytest.mark.parametrize(("name", "engine"), CASES)
def test_what_a_rank_holds_is_what_the_plan_gives_it(name: str, engine: str) -> None:
    config, topology, pipeline = compose(*LAYOUTS[name])
    config = replace(config, parallel=replace(config.parallel, engine=EngineName(engine)))
    real = max(add_up(config, topology, pipeline, rank) for rank in range(topology.pp))
    # Parts of a vocabulary differ by a row, and an embedding that two pipeline ranks have is cut over both.
    assert estimate(config, topology, pipeline).total == pytest.approx(real, rel=0.02)


def test_a_precision_of_more_bits_takes_more() -> None:
    sizes = [estimate(*compose(f"precision={name}")).total for name in ("bf16", "fp32", "fp64")]
    parameters = sizes[1] / 16  # float32: weights that are masters, two moments, gradients
    assert sizes[2] == 2 * sizes[1] and 17.9 < sizes[0] / parameters < 18
