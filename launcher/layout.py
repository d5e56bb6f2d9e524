"""``shoestring layout``: who is in which group and has which layers, for any number of ranks, without starting one.

    shoestring layout parallel.dp=4 parallel.tp=2 parallel.ep=4          every rank and every group
    shoestring layout 5 parallel.dp=4 parallel.tp=2 parallel.ep=4        the groups of rank 5

There are pp * dp * cp * tp ranks; dp is 1 if nothing is said. Consecutive ranks share a node. Loads no torch.
"""

import sys
from typing import TYPE_CHECKING

from configs.schema import RunConfig
from launcher import cli
from launcher.invocation import Invocation
from launcher.ranks import check_layout
from parallel.topology import Axis, Topology
from parallel.traffic import GROUPS
from training.ramp import count_microbatches

if TYPE_CHECKING:
    from model.config import ModelConfig
    from parallel.pipeline.stages import Pipeline

SUMMARY = "print who is in which group, for any number of ranks, without starting one"
OPTIONAL = ("rank",)

DENSE = (Axis.pp, Axis.dp, Axis.cp, Axis.tp)
EXPERT = (Axis.edp, Axis.ep)
SMALL = 16  # ranks: up to here all are shown
SHOWN = 4  # of a larger world: groups of an axis, and ranks of a group


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints the layout, or one rank's place in it."""
    topology = check_layout(config, None)
    node = config.cluster.devices_per_node
    pipeline = divide_layers(config, topology)
    if invocation.arguments:
        rank = _read_rank(invocation.arguments[0], topology)
        first, *lines = describe_rank(topology, node, rank)
        held = pipeline.stage_map.stages_of(topology.coordinate(rank, Axis.pp))
        stages = list_stages(config.model, pipeline, held)
        lines = [first, *stages, *([""] if stages else []), *lines]
    else:
        stages = list_stages(config.model, pipeline, tuple(range(len(pipeline.layers))))
        lines = [*describe_world(config, topology), *stages]
        lines += ["", *list_ranks(topology, node), "", *list_groups(topology, node)]
    print("\n".join(lines))
    return 0


def describe_world(config: RunConfig, topology: Topology) -> list[str]:
    """How many ranks there are, and what each of them has of a step."""
    model, run, node = config.model, config.run, config.cluster.devices_per_node
    batch = run.global_batch // topology.dp
    lines = [
        f"{run.name}: {_count(topology.world, 'rank')} on {_count(-(-topology.world // node), 'node')} of "
        f"{_count(node, 'device')}: {_write_degrees(topology, (*DENSE, *EXPERT))}",
        f"  dp  a replica trains on {batch} of {run.global_batch} sequences a step, "
        f"{min(run.micro_batch, batch)} at a time",
        f"  tp  a rank has {config.data.sequence_length // topology.tp} of {config.data.sequence_length} tokens of a "
        f"sequence and {model.attention.heads // topology.tp} of {model.attention.heads} heads",
    ]
    if topology.pp > 1:
        count = count_microbatches(run.global_batch, run.micro_batch, topology.dp)
        lines.append(f"  pp  {config.parallel.name_schedule()} over {topology.pp} ranks, {count} micro-batches a step")
    if model.moe.experts:
        lines.append(
            f"  ep  a rank has {model.moe.experts // topology.ep} of {model.moe.experts} routed experts a layer; "
            f"every expert has {_count(topology.edp, 'holder')}"
        )
    return lines


def divide_layers(config: RunConfig, topology: Topology) -> "Pipeline":
    """Which layers are a stage, and which pipeline ranks have it."""
    from parallel.pipeline.stages import whole

    if topology.pp == 1:
        return whole(config.model)
    from parallel.pipeline.plan import divide_model  # loads numpy, which a layout without a pipeline does without
    from training.arrange import take_schedule

    return divide_model(config.parallel, config.model, take_schedule(config, topology.dp))


def list_stages(model: "ModelConfig", pipeline: "Pipeline", stages: tuple[int, ...]) -> list[str]:
    """A table of these stages of several; of many, the first and the last."""
    from parallel.pipeline.stages import weigh

    if len(pipeline.layers) == 1:
        return []
    shares, last = weigh(model, pipeline.layers), len(pipeline.layers) - 1
    lines = ["", f"{'stage':>6}{'cost':>6}   {'on pp':<12}layers"]
    for stage in stages if len(stages) <= SMALL else (*stages[: SMALL // 2], stages[-1]):
        if stage == stages[-1] and len(stages) > SMALL:
            lines.append(f"{'..':>6}")
        held = pipeline.layers[stage]
        first, stop = held.start, held.stop - 1
        words = [f"{first}-{stop}" if stop > first else f"{first}"]
        words += ["embedding"] if stage in pipeline.stages_of("embedding.weight", model) else []
        words += ["norm, head"] if stage == last else []
        words += ["MTP"] if stage == last and model.mtp.depth else []
        where = " ".join(map(str, pipeline.stage_map.holders_of[stage]))
        lines.append(f"{stage:>6}{shares[stage]:>6.0%}   {where:<12}{', '.join(words)}")
    return lines


def list_ranks(topology: Topology, node: int) -> list[str]:
    """A table of coordinates; of a large world, its first ranks and its last."""
    columns = ("rank", "node", *DENSE, *EXPERT)
    lines = ["".join(f"{column:>6}" for column in columns)]
    whole = topology.world <= SMALL
    for rank in range(topology.world if whole else SMALL // 2):
        lines.append(_write_row(topology, node, rank))
    return lines if whole else [*lines, f"{'..':>6}", _write_row(topology, node, topology.world - 1)]


def list_groups(topology: Topology, node: int) -> list[str]:
    """Per axis: its groups, of how many ranks, how many of them do not fit in a node, and who is in them."""
    lines = [f"{'axis':<10}{'groups':>7}{'ranks':>7}{'across nodes':>14}   what travels"]
    for axis, travels in _by_axis().items():
        crossing = sum(group[0] // node != group[-1] // node for group in topology.groups(axis))
        size = topology.degree(axis)
        lines.append(f"{axis:<10}{topology.world // size:>7}{size:>7}{crossing:>14}   {'; '.join(travels)}")
        if size > 1:
            lines.append(f"{'':<10}{_write_groups(topology, axis)}")
    return lines


def describe_rank(topology: Topology, node: int, rank: int) -> list[str]:
    """One rank's coordinates and groups."""
    places = ", ".join(f"{axis} {topology.coordinate(rank, axis)}" for axis in (*DENSE, *EXPERT))
    lines = [f"rank {rank} of {topology.world}: device {rank % node} of node {rank // node}; {places}"]
    lines.append(f"{'axis':<10}{'place':>7}{'ranks':>7}   the ranks it talks to, and about what")
    for axis, travels in _by_axis().items():
        group = topology.group(rank, axis)
        place = f"{topology.coordinate(rank, axis):>7}{len(group):>7}"
        lines.append(f"{axis:<10}{place}   {_write_ranks(group, whole=topology.world <= SMALL)}: {'; '.join(travels)}")
    return lines


def _by_axis() -> dict[Axis, list[str]]:
    """What travels along each axis."""
    found: dict[Axis, list[str]] = {}
    for (axis, _), what in GROUPS.items():
        found.setdefault(axis, []).append(what)
    return found


def _read_rank(word: str, topology: Topology) -> int:
    if not word.isdecimal() or int(word) >= topology.world:
        raise ValueError(
            f"rank={word} must be a number from 0 to {topology.world - 1}: there are "
            f"{_write_degrees(topology, DENSE)} = {topology.world} ranks"
        )
    return int(word)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _write_degrees(topology: Topology, axes: tuple[Axis, ...]) -> str:
    return " ".join(f"{axis}={topology.degree(axis)}" for axis in axes)


def _write_row(topology: Topology, node: int, rank: int) -> str:
    places = (topology.coordinate(rank, axis) for axis in (*DENSE, *EXPERT))
    return "".join(f"{number:>6}" for number in (rank, rank // node, *places))


def _write_groups(topology: Topology, axis: Axis) -> str:
    """``0 1 | 2 3 | .. | 30 31``; a large world's are cut short in the middle."""
    whole = topology.world <= SMALL
    groups = [_write_ranks(group, whole) for group in topology.groups(axis)]
    if not whole and len(groups) > SHOWN:
        groups[SHOWN - 2 : -1] = [".."]
    return " | ".join(groups)


def _write_ranks(group: tuple[int, ...], whole: bool) -> str:
    """``0 1 2 3``, and, unless the ``whole`` is asked for, ``0-15`` and ``0 4 .. 60``."""
    if whole or len(group) <= SHOWN:
        return " ".join(map(str, group))
    if group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}-{group[-1]}"
    return f"{group[0]} {group[1]} .. {group[-1]}"


if __name__ == "__main__":
    sys.exit(cli.main(["layout", *sys.argv[1:]]))
