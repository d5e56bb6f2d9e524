"""A user's configuration as a proof of a few seconds: everything that layouts can get wrong is kept, sizes are not.

kept        degrees, engine, heads, experts, groups, top_k, shared experts, router, prediction depth, recomputation,
            tied embeddings, optimizer, moves of experts, and what is left over when a width is divided among the ranks;
            a pipeline's schedule, stages, and what is left over when its micro-batches are divided among its ranks
shrunk      layers to one of each kind, or to one a stage and one over; hidden sizes, vocabulary, tokens of a sequence
            (in FP8 to tiles); micro-batches to twice the pipeline's ranks
left out    names and the learning rate's size and schedule: configurations that differ in them alone have one proof
lowered     above ``RANKS`` ranks dp, ep as far as it then has to be, and a pipeline of more than ``LENGTH`` ranks
"""

from dataclasses import replace
from typing import NamedTuple

from configs.schema import TrainConfig
from model.config import ModelConfig
from parallel.config import ParallelConfig, PipelineConfig, ScheduleName, TensorOverlap
from parallel.pipeline.plan import schedule_of
from parallel.topology import Topology
from training.config import MomentDtype, RateConfig
from training.proof.case import Case
from training.proof.lower import list_lengths, lower
from training.proof.tiles import round_to_tiles
from training.ramp import count_microbatches

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
    stages = 1
    if topology.pp == 1 and pipeline == PipelineConfig(schedule=ScheduleName["1f1b"]):
        accumulation = min(count, 2)
    else:
        accumulation = count if pipeline.file else max(3, 2 * small.pp + count % small.pp)
        stages = schedule_of(ParallelConfig(pp=small.pp, pipeline=pipeline), accumulation).stages
    case = Case(
        topology=small,
        model=shrink_model(config.model, small.stage_size, stages),
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
        length=small.cp * small.tp * max(2, TOKENS // (small.cp * small.tp)),
        documents=config.data.mask_documents,
        rebalance=parallel.rebalance_every > 0,
    )
    case, left_out = round_to_tiles(case, config.precision)
    unproved += left_out
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

    a, routed = model.attention, sum(map(model.is_moe, range(model.num_layers)))
    dense = model.num_layers - routed
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
            kv_rank=None if a.kv_rank is None else reduce(a.kv_rank, 5),
            nope_dim=min(a.nope_dim, 4),
            rope_dim=min(a.rope_dim, 6),
            v_dim=min(a.v_dim, 3),
        ),
        moe=replace(model.moe, ffn=reduce(model.moe.ffn, 5), pad=min(model.moe.pad, 4), every=1, skip=())
        if model.moe.experts
        else model.moe,
    )
