"""What a rank has to hold to train: weights, masters, moments, gradients, by arithmetic. Standard library only.

    bytes of a parameter = FORMULAS[engine](its dtype, its holders)      docs/engines.md, "added up"; measured there

                      on a rank            holders
    rows and widths   1/tp of them         dp * cp         embedding, head, heads, dense and shared MLPs
    replicated        all                  dp * cp * tp    norms, routers, latent projections
    experts           1/ep of them         edp             and each times the pipeline ranks that have a copy

Activations, buckets on their way and what libraries take come on top: nothing here predicts them.
"""

from collections.abc import Callable
from typing import NamedTuple

from configs.schema import TrainConfig
from model.config import ModelConfig
from model.count import count_biases, count_norms
from parallel.config import EngineName
from parallel.pipeline.stages import Pipeline
from parallel.placement import HOLDERS
from parallel.topology import Axis, Topology
from training.config import MomentDtype, Precision


class Bytes(NamedTuple):
    """A formula's, of one parameter; or of all that a rank holds."""

    weights: float  # and masters
    moments: float
    gradients: float

    @property
    def total(self) -> float:
        return sum(self)


# c bytes of an element to compute with, w whether that is float32 already, m bytes of both moments, n holders.
FORMULAS: dict[EngineName, Callable[[int, bool, int, int], Bytes]] = {
    EngineName.native: lambda c, w, m, n: Bytes(c + (0 if w else 4 / n), m / n, 4),
    EngineName.fsdp2: lambda c, w, m, n: Bytes(4 / n, m / n, 4 / n),
    EngineName.zero1: lambda c, w, m, n: Bytes(c + 4 / n, m / n, 4),
    EngineName.zero2: lambda c, w, m, n: Bytes(c + 4 / n, m / n, 4 / n),
    EngineName.zero3: lambda c, w, m, n: Bytes((c + 4) / n, m / n, 4 / n),
}


class Part(NamedTuple):
    """Parameters of a model that lie alike: what they are split over, and whether they are float32 in any precision."""

    size: int
    axis: Axis | None  # that splits them; None: every rank of the stage has them whole
    wide: bool = False


def estimate(config: TrainConfig, topology: Topology, pipeline: Pipeline) -> Bytes:
    """What the rank holds that holds most. A copy of a stage (DualPipe) counts as if it were alone: at most so much."""
    ranks = {rank for holders in pipeline.stage_map.holders_of for rank in holders}
    found = (weigh(config, topology, list_parts(config.model, pipeline, rank)) for rank in sorted(ranks))
    return max(found, key=lambda each: each.total)


def weigh(config: TrainConfig, topology: Topology, parts: list[Part]) -> Bytes:
    """What the first rank of a stage holds of ``parts``."""
    engine, double = config.parallel.engine, config.precision is Precision.fp64
    narrow = config.precision not in (Precision.fp32, Precision.fp64)
    moments = 4 if config.optimizer.moments is MomentDtype.bf16 else 8
    found = []
    for part in parts:
        here = -(-part.size // topology.degree(part.axis)) if part.axis else part.size
        holders = HOLDERS[part.axis]
        if engine is EngineName.fsdp2 and part.axis is not Axis.ep:
            holders = Axis.replicas  # all that it cuts over
        wide = part.wide or not narrow
        each = FORMULAS[engine](4 if wide else 2, wide, moments, topology.degree(holders))
        found.append([here * (2 if double else 1) * value for value in each])
    return Bytes(*map(sum, zip(*found, strict=True)))


def list_parts(model: ModelConfig, pipeline: Pipeline, place: int) -> list[Part]:
    """What pipeline rank ``place`` holds of a model, once however many of its stages have it."""
    stages = pipeline.stage_map.stages_of(place)
    parts = [part for stage in stages for layer in pipeline.layers[stage] for part in list_block(model, layer)]
    last = len(pipeline.layers) - 1
    table = Part(model.vocab_size * model.hidden, Axis.tp)
    if place in pipeline.across("embedding.weight", model):
        parts.append(table)
    if last in stages:
        parts += [Part(model.hidden, None), *([] if model.tied else [table])]
        for depth in range(model.mtp.depth):
            parts += [*list_block(model, model.num_layers + depth)]
            parts.append(Part(2 * model.hidden**2 + 3 * model.hidden, None))
    return parts


def list_block(model: ModelConfig, layer: int) -> list[Part]:
    """The parameters of one block, by where they lie: the rows of parallel/plan.py, counted."""
    a, m, hidden = model.attention, model.moe, model.hidden
    query, latent = a.heads * a.width, 0
    if a.kv_rank is None:
        heads = hidden * (query + (a.kv_heads or 0) * (a.width + a.v_dim)) + count_biases(a)
    else:
        heads = (a.q_rank or hidden) * query + a.kv_rank * a.heads * (a.nope_dim + a.v_dim)
        latent = hidden * (a.kv_rank + a.rope_dim) + hidden * (a.q_rank or 0)
    heads += a.heads * a.v_dim * hidden
    parts = [Part(heads, Axis.tp), Part(latent + 2 * hidden + count_norms(a), None)]
    if not model.is_moe(layer):
        return [*parts, Part(3 * hidden * model.ffn, Axis.tp)]
    expert = 3 * hidden * m.ffn
    return [
        *parts,
        Part(m.experts * expert, Axis.ep),
        Part(m.shared_experts * expert, Axis.tp),
        Part(m.experts * hidden, None, wide=True),
    ]
