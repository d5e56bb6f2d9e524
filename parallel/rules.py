"""Which models and batches a layout takes. Standard library only: asked when a configuration is composed and at start.

    attention heads      divide by tp            a rank computes whole heads, of keys and values too
    routed experts       divide by ep            a rank holds whole experts, equally many
    sequence length      divides by cp * tp      ranks hold equal shards of a sequence
    every global batch   divides by dp           replicas train on equally many sequences
    layers               at least one a stage
    pipeline ranks, stages a rank, micro-batches: what the schedule's rule says (parallel/pipeline/schedules.py)

Vocabulary and MLP widths need not divide: their parts differ by one row at most (parallel/placement.py).
"""

from collections.abc import Iterable

from model.config import ModelConfig
from parallel.config import ParallelConfig
from parallel.pipeline.schedules import SCHEDULES
from parallel.pipeline.schedules import check as check_schedule
from parallel.pipeline.stages import divide
from parallel.topology import Topology


def check(model: ModelConfig, sequence_length: int, global_batches: Iterable[int], topology: Topology) -> None:
    """Raises ValueError if ``topology`` cannot train ``model`` on sequences of ``sequence_length`` tokens.

    ``global_batches`` are the sizes that the batch takes in a run, in sequences; the last is ``run.global_batch``.
    """
    check_model(model, sequence_length, topology)
    *ramp, full = global_batches
    for batch in ramp:
        if batch % topology.dp:
            raise ValueError(
                f"run.ramp makes a batch of {batch}, which must be divisible by parallel.dp={topology.dp}: replicas "
                "train on equally many sequences; make run.ramp.start and run.ramp.jump multiples of parallel.dp"
            )
    if full % topology.dp:
        raise ValueError(
            f"run.global_batch={full} must be divisible by parallel.dp={topology.dp}: replicas train on equally many "
            f"sequences; the nearest that are: {multiples(full, topology.dp)}"
        )


def check_model(model: ModelConfig, sequence_length: int, layout: Topology | ParallelConfig) -> None:
    """The rules that hold whatever dp is. Raises ValueError."""
    heads, experts, shards = model.attention.heads, model.moe.experts, layout.cp * layout.tp
    if (kv_heads := model.attention.kv_heads or heads) % layout.tp:
        heads, name = kv_heads, "kv_heads" if model.attention.kv_heads else "heads"
        raise ValueError(
            f"parallel.tp={layout.tp} must divide model.attention.{name}={heads}: a rank computes whole heads; "
            f"the nearest that do: {_divisors(heads, layout.tp)}"
        )
    if layout.ep > 1 and experts == 0:
        raise ValueError(f"parallel.ep={layout.ep} must be 1: with model.moe.experts=0 there are no experts to spread")
    if experts % layout.ep:
        raise ValueError(
            f"parallel.ep={layout.ep} must divide model.moe.experts={experts}: a rank holds whole experts, equally "
            f"many; the nearest that do: {_divisors(experts, layout.ep)}"
        )
    if sequence_length % shards:
        raise ValueError(
            f"data.sequence_length={sequence_length} must be divisible by parallel.cp*tp = {layout.cp}*{layout.tp} = "
            f"{shards}: ranks hold equal shards of a sequence; the nearest that are: "
            f"{multiples(sequence_length, shards)}"
        )


def check_tiles(model: ModelConfig, sequence_length: int, tp: int, tile: int) -> None:
    """Raises ValueError if ``tp`` cuts one of the widths that a product in FP8 has elsewhere than between tiles."""
    a, dense = model.attention, not all(map(model.is_moe, range(model.num_layers)))
    if a.kv_heads is None:
        heads = {
            "model.attention.heads * (nope_dim + rope_dim)": a.heads * a.width,
            "model.attention.heads * (nope_dim + v_dim)": a.heads * (a.nope_dim + a.v_dim),
        }
    else:
        of_a_head = a.heads // a.kv_heads * a.width + a.width + a.v_dim
        heads = {"model.attention: queries, keys and values of its kv_heads": a.kv_heads * of_a_head}
    widths = {
        **heads,
        "model.attention.heads * v_dim": a.heads * a.v_dim,
        "data.sequence_length": sequence_length,
        **({"model.ffn": model.ffn} if dense else {}),
        **({"model.moe.ffn * shared_experts": model.moe.ffn * model.moe.shared_experts} if model.moe.experts else {}),
    }
    for key, width in widths.items():
        if tp > 1 and width % (tp * tile):
            raise ValueError(
                f"parallel.tp={tp} must cut {key} = {width} into multiples of {tile}, and {_part(width, tp)} is none: "
                f"in this precision {tile} values share a scale; the nearest it can cut: {multiples(width, tp * tile)}"
            )


def check_pipeline(model: ModelConfig, parallel: ParallelConfig) -> None:
    """The rules of a schedule by name that hold whatever the batch is. Raises ValueError.

    A schedule in a file is read when a run starts (training/arrange.py): its configuration outlives the file.
    """
    p = parallel.pipeline
    if p.file is None:
        # As many micro-batches as any schedule wants.
        check_schedule(parallel.schedule, parallel.pp, 2 * parallel.pp, p.virtual)
        divide(model, SCHEDULES[parallel.schedule].stages(parallel.pp, p.virtual), p.layers)


def _part(width: int, degree: int) -> str:
    """What a rank of ``degree`` gets of ``width``."""
    return f"{width}/{degree}" if width % degree else str(width // degree)


def _divisors(number: int, degree: int) -> str:
    """The divisors of ``number`` on either side of ``degree``."""
    all_of_them = [divisor for divisor in range(1, number + 1) if number % divisor == 0]
    below = [divisor for divisor in all_of_them if divisor < degree][-1:]
    above = [divisor for divisor in all_of_them if divisor > degree][:1]
    return ", ".join(map(str, below + above))


def multiples(number: int, degree: int) -> str:
    """The positive multiples of ``degree`` on either side of ``number``."""
    below = number // degree * degree
    return ", ".join(str(multiple) for multiple in (below, below + degree) if multiple)
