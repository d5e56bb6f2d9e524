"""A user's configuration as a proof of a few seconds: everything that layouts can get wrong is kept, sizes are not.

kept        degrees, engine, heads, experts, groups, top_k, shared experts, router, prediction depth, recomputation,
            tied embeddings, optimizer, moves of experts, and what is left over when a width is divided among the ranks
shrunk      layers to one of each kind; hidden sizes, vocabulary, and tokens of a sequence
left out    names and the learning rate's size and schedule: configurations that differ in them alone have one proof
lowered     above ``RANKS`` ranks dp first, and ep as far as it then has to be
"""

from dataclasses import replace
from typing import NamedTuple

from configs.schema import TrainConfig
from model.config import ModelConfig
from parallel.topology import Topology
from training.config import MomentDtype, RateConfig
from training.proof.case import Case

RANKS = 16
TOKENS = 8  # of a sequence, at least


class Shrunk(NamedTuple):
    """What is proved, and what is not."""

    cases: dict[str, Case]
    unproved: list[str]


def shrink(config: TrainConfig, topology: Topology) -> Shrunk:
    """The cases that stand for ``config`` on ``topology``. ValueError for a layout that is too large: see ``lower``."""
    small, unproved = lower(topology, config.model.moe.experts)
    micro_batches = config.run.global_batch // (config.run.micro_batch * topology.dp)
    case = Case(
        topology=small,
        model=shrink_model(config.model, small.stage_size),
        optimizer=replace(
            config.optimizer,
            lr=1e-3,
            rate=RateConfig(),
            moments=MomentDtype.master,  # float64 has no bfloat16 moments
            bucket_bytes=4096,  # small, so that there are many
        ),
        engine=config.parallel.engine,
        micro_batch=min(config.run.micro_batch, 2),
        accumulation=min(max(micro_batches, 1), 2),
        length=small.cp * small.tp * max(2, TOKENS // (small.cp * small.tp)),
        documents=config.data.mask_documents,
        rebalance=config.parallel.rebalance_every > 0,
    )
    moving = ", experts change ranks after every step" if case.rebalance else ""
    cases = {f"spread{moving}": case}
    if config.model.moe.experts:
        cases[f"crowded: every token goes to the first experts{moving}"] = replace(case, crowded=True)
    return Shrunk(cases, unproved)


def shrink_model(model: ModelConfig, ranks: int) -> ModelConfig:
    """One layer of each kind and small widths, each with the remainder it leaves when divided by ``ranks``."""

    def reduce(size: int, least: int) -> int:
        least = max(least, ranks)  # every rank gets something: fully_shard takes no empty weights
        return size if size <= least else least + (size - least) % ranks

    a, dense = model.attention, min(model.dense_layers, 1)
    return replace(
        model,
        name="proof",
        num_layers=dense + min(model.num_layers - model.dense_layers, 1),
        dense_layers=dense,
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


def lower(topology: Topology, experts: int) -> tuple[Topology, list[str]]:
    """A layout of at most ``RANKS`` ranks like ``topology``, and what of it is not proved, in words.

    Experts that had several holders keep several. Raises ValueError where tp alone is more than ``RANKS``.
    """
    if topology.world <= RANKS:
        return topology, []
    if topology.tp * topology.cp > RANKS:
        raise ValueError(
            f"parallel.tp={topology.tp} must be at most {RANKS} to be proved on one machine; "
            "verify=skip trains without a proof"
        )
    dp = max(d for d in range(1, topology.dp + 1) if topology.dp % d == 0 and d * topology.tp * topology.cp <= RANKS)
    stage = dp * topology.tp * topology.cp
    most = stage // 2 if topology.edp > 1 and stage > 1 else stage
    ep = max(e for e in range(1, most + 1) if topology.ep % e == 0 and stage % e == 0 and (experts % e == 0))
    small = replace(topology, dp=dp, ep=ep)
    lowered = [
        f"parallel.{axis}={getattr(topology, axis)}: proved with {getattr(small, axis)}"
        for axis in ("dp", "ep")
        if getattr(topology, axis) != getattr(small, axis)
    ]
    return small, lowered
