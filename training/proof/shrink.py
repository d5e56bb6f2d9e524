"""A user's configuration as a proof of a few seconds: everything that layouts can get wrong is kept, sizes are not.

kept        degrees, engine, heads, experts, groups, top_k, shared experts, router, prediction depth, recomputation,
            tied embeddings, optimizer, moves of experts, and what is left over when a width is divided among the ranks;
            a pipeline's schedule, stages, and what is left over when its micro-batches are divided among its ranks
shrunk      layers to one of each kind, or to one a stage and one over; hidden sizes, vocabulary, tokens of a sequence
            (in FP8 to tiles); micro-batches to twice the pipeline's ranks
left out    names and the learning rate's size and schedule: configurations that differ in them alone have one proof
lowered     above ``RANKS`` ranks dp, ep as far as it then has to be, and a pipeline of more than ``LENGTH`` ranks
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from configs.schema import TrainConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PipelineConfig, ScheduleName, TensorOverlap
from parallel.pipeline.plan import schedule_of
from parallel.pipeline.schedules import SCHEDULES
from parallel.topology import Topology
from training.config import TILES, MomentDtype, RateConfig
from training.determinism import NUMERICS
from training.proof.case import Case
from training.ramp import count_microbatches
from training.support import DEEPSPEED

RANKS = 16
LENGTH = 4  # of a pipeline: ends, and something between them
TOKENS = 8  # of a sequence, at least


class Shrunk(NamedTuple):
    """What is proved, and what is not."""

    cases: dict[str, Case]
    unproved: list[str]


def shrink(config: TrainConfig, topology: Topology) -> Shrunk:
    """The cases that stand for ``config`` on ``topology``. ValueError for a layout that is too large: see ``lower``."""
    parallel, run = config.parallel, config.run
    small, unproved = lower(topology, config.model.moe.experts, list_lengths(parallel))
    pipeline = replace(parallel.pipeline, schedule=parallel.schedule, layers=None)
    count = count_microbatches(run.global_batch, run.micro_batch, topology.dp)
    overlap = parallel.overlap
    if overlap.tensor is TensorOverlap.fused:
        unproved.append("parallel.overlap.tensor=fused: proved with blocks, which runs on a processor")
        overlap = replace(overlap, tensor=TensorOverlap.blocks)
    rounded = config.precision in TILES and parallel.engine in DEEPSPEED
    if rounded:
        unproved.append(
            f"steps after the first: parallel.engine={parallel.engine} rounds weights to float32, which moves some to "
            f"another value of precision={config.precision}"
        )
    stages = 1
    if topology.pp == 1 and pipeline == PipelineConfig(schedule=ScheduleName["1f1b"]):
        accumulation = min(count, 2)
    else:
        accumulation = count if pipeline.file else max(3, 2 * small.pp + count % small.pp)
        stages = schedule_of(ParallelConfig(pp=small.pp, pipeline=pipeline), accumulation).stages
    model, recipe = shrink_model(config.model, small.stage_size, stages), NUMERICS[config.precision].recipe
    tile = 1 if recipe is None else recipe.activations.tile[1]
    length = max(2, TOKENS // (small.cp * small.tp))
    case = Case(
        topology=small,
        model=model if recipe is None else widen(model, small.tp, tile),
        recipe=recipe,
        optimizer=replace(
            config.optimizer,
            lr=1e-3,
            rate=RateConfig(),
            moments=MomentDtype.master,  # float64 has no bfloat16 moments
            bucket_bytes=4096,  # small, so that there are many
        ),
        engine=parallel.engine,
        pipeline=pipeline,
        overlap=overlap,
        micro_batch=min(config.run.micro_batch, 2),
        accumulation=accumulation,
        length=small.cp * small.tp * max(length, tile),
        documents=config.data.mask_documents,
        rebalance=parallel.rebalance_every > 0,
        **({"steps": 1} if rounded else {}),
    )
    moving = ", experts change ranks after every step" if case.rebalance else ""
    cases = {f"spread{moving}": case}
    if config.model.moe.experts:
        cases[f"crowded: every token goes to the first experts{moving}"] = replace(case, crowded=True)
    return Shrunk(cases, unproved)


def shrink_model(model: ModelConfig, ranks: int, stages: int = 1) -> ModelConfig:
    """One layer of each kind, and one for each of several stages and one over; and small widths, each with the
    remainder that it leaves when divided by ``ranks``."""

    def reduce(size: int, least: int) -> int:
        least = max(least, ranks)  # every rank gets something: fully_shard takes no empty weights
        return size if size <= least else least + (size - least) % ranks

    a, dense, routed = model.attention, model.dense_layers, model.num_layers - model.dense_layers
    layers = max(min(dense, 1) + min(routed, 1), min(stages + 1, model.num_layers) if stages > 1 else 1)
    return replace(
        model,
        name="proof",
        num_layers=layers,
        dense_layers=min(dense, 1) if routed else layers,
        hidden=reduce(model.hidden, 12),
        ffn=reduce(model.ffn, 10),
        vocab_size=reduce(model.vocab_size, 19),
        init_std=0.3,
        attention=replace(
            a,
            q_rank=None if a.q_rank is None else reduce(a.q_rank, 7),
            kv_rank=reduce(a.kv_rank, 5),
            nope_dim=min(a.nope_dim, 4),
            rope_dim=min(a.rope_dim, 6),
            v_dim=min(a.v_dim, 3),
        ),
        moe=replace(model.moe, ffn=reduce(model.moe.ffn, 5), pad=min(model.moe.pad, 4))
        if model.moe.experts
        else model.moe,
    )


def widen(model: ModelConfig, tp: int, tile: int) -> ModelConfig:
    """``model`` with widths that ``tp`` cuts into whole tiles: those of each head as small as that allows."""
    heads = model.attention.heads // tp
    width = max(2, tile // math.gcd(tile, heads))
    return replace(
        model,
        hidden=tile,
        ffn=tp * tile,
        attention=replace(
            model.attention,
            q_rank=None if model.attention.q_rank is None else tile,
            kv_rank=tile,
            nope_dim=width,
            rope_dim=width,
            v_dim=width,
        ),
        moe=replace(model.moe, ffn=tp * tile) if model.moe.experts else model.moe,
    )


def list_lengths(parallel: ParallelConfig) -> Sequence[int]:
    """The numbers of pipeline ranks that can stand for ``parallel.pp``: those that its schedule takes."""
    if parallel.pp == 1 or parallel.pipeline.file is not None:
        return (parallel.pp,)
    return range(2, parallel.pp + 1, 2 if SCHEDULES[parallel.schedule].even else 1)


def lower(topology: Topology, experts: int, lengths: Sequence[int] = (1,)) -> tuple[Topology, list[str]]:
    """A layout of at most ``RANKS`` ranks like ``topology``, and what of it is not proved, in words.

    Every axis that had several ranks keeps several, and so do the holders of an expert, as far as that is possible; a
    pipeline, of one of ``lengths``, keeps ``LENGTH`` before dp and ep are kept large. Raises ValueError where tp
    alone, or with the shortest pipeline, is more than ``RANKS``.
    """
    if topology.world <= RANKS:
        return topology, []
    shards, shortest = topology.tp * topology.cp, min(lengths)
    if shortest > RANKS:
        raise ValueError(
            f"parallel.pp={topology.pp} must be at most {RANKS} to be proved on one machine with a schedule of your "
            "own; verify=skip trains without a proof"
        )
    if shards * shortest > RANKS:
        raise ValueError(
            f"parallel.tp={topology.tp} must be at most {RANKS // shortest} to be proved on one machine"
            f"{' with a pipeline' if shortest > 1 else ''}; verify=skip trains without a proof"
        )
    small = max(
        (
            replace(topology, pp=pp, dp=dp, ep=ep)
            for pp in lengths
            for dp in _divisors(topology.dp, RANKS // (pp * shards))
            for ep in _divisors(topology.ep, dp * shards)
            if dp * shards % ep == 0 and experts % ep == 0
        ),
        key=lambda t: _rate(t, topology),
    )
    lowered = [
        f"parallel.{axis}={getattr(topology, axis)}: proved with {getattr(small, axis)}"
        for axis in ("pp", "dp", "ep")
        if getattr(topology, axis) != getattr(small, axis)
    ]
    return small, lowered


def _rate(small: Topology, large: Topology) -> tuple[int, ...]:
    """The higher, the better ``small`` stands for ``large``."""
    kept = sum((getattr(small, axis) > 1) == (getattr(large, axis) > 1) for axis in ("dp", "ep", "edp"))
    return kept, min(small.pp, LENGTH), small.dp, small.ep, small.pp


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]
