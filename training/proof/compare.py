"""A rank's trace against the plain one: everything that should be equal, as differences."""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from model.build import Region
from parallel.mesh import Mesh
from parallel.placement import Shard, span
from parallel.topology import Axis
from training.proof.case import Case, place_sequences
from training.proof.parts import Parts, locate, reduce_parts
from training.proof.report import Difference
from training.proof.trace import Choices, Step, Trace


def compare(case: Case, mesh: Mesh, plain: Trace, trace: Trace, shards: Mapping[str, Shard]) -> Iterator[Difference]:
    """Everything this rank can say."""
    floor = max((float(gradient.abs().max()) for gradient in plain.gradients.values()), default=0.0) / 100
    here = case.stages.names_of(mesh.coordinate(Axis.pp), plain.initial, case.model)
    plain = restrict(plain, here)
    yield from compare_tensors("initial weights", trace.initial, plain.initial, shards)
    yield Difference("data order", float((trace.read != plain.read).sum()), "step 0")
    yield Difference("loss", relate(trace.loss, plain.loss), "step 0")
    yield compare_routing(case, mesh, trace.routing, plain.routing)
    yield from compare_tensors("gradients", trace.gradients, plain.gradients, shards, floor)
    yield from compare_moments(case, mesh, trace, plain, shards, floor)
    for step, (ours, theirs) in enumerate(zip(trace.steps, plain.steps, strict=True)):
        yield from compare_steps(f"step {step}", ours, theirs)
    biases = plain.final.keys() - shards.keys()
    for what, names in (("selection biases", biases), ("weights", shards.keys())):
        final, expected = ({n: t for n, t in run.final.items() if n in names} for run in (trace, plain))
        yield from compare_tensors(what, final, expected, shards)
    weights = {name: trace.final[name] for name in shards}
    largest = reduce_parts(weights, shards, mesh, dist.ReduceOp.MAX)
    for name, smallest in reduce_parts(weights, shards, mesh, dist.ReduceOp.MIN).items():
        apart = largest[name] - smallest
        yield Difference("replicas", float(apart.max()) if apart.numel() else 0.0, name)


def compare_steps(where: str, ours: Step, plain: Step) -> Iterator[Difference]:
    """What a step reports; a rank reports the sums over all."""
    yield Difference("cross entropy", relate(ours.sums, plain.sums), where)
    yield Difference("auxiliary loss", relate(ours.aux, plain.aux), where)
    yield Difference("token counts", relate(ours.load, plain.load), where)
    norms, factors = ([torch.tensor(getattr(run.update, of)) for run in (ours, plain)] for of in ("norm", "factor"))
    yield Difference("gradient norm", relate(norms[0], norms[1]), where)
    yield Difference("clip factor", relate(factors[0], factors[1]), where)


def compare_tensors(
    what: str, ours: Parts, plain: Parts, shards: Mapping[str, Shard], floor: float = 0.0
) -> Iterator[Difference]:
    """Each part against the cut of the plain tensor."""
    for name in sorted(ours.keys() ^ plain.keys()):
        yield Difference(what, math.inf, f"{name} is not in both models")
    for name in sorted(ours.keys() & plain.keys()):
        region = shards[name].slices if name in shards else (slice(None),) * plain[name].dim()
        yield compare_part(Difference(what, 0.0, name), ours[name], plain[name], region, floor)


def compare_part(named: Difference, ours: Tensor, plain: Tensor, region: Region, floor: float) -> Difference:
    """A part against ``region`` of the plain tensor, on the scale of the whole tensor's largest entry or ``floor``."""
    part = plain[region]
    size = relate(ours, part, max(float(plain.abs().max()), floor) if plain.numel() else 0.0)
    if not 0 < size < math.inf or not part.any():
        return named._replace(size=size)
    ratio = f"{float((ours * part).sum() / part.square().sum()):.6g}"
    return named._replace(
        size=size, where=named.where if ratio == "1" else f"{named.where}, {ratio} times the plain one"
    )


def compare_moments(
    case: Case, mesh: Mesh, ours: Trace, plain: Trace, shards: Mapping[str, Shard], floor: float
) -> Iterator[Difference]:
    """The gradients that the engine used, by its first moments (1 - beta1) factor g, and who keeps which part."""
    kept = (1 - case.optimizer.beta1) * ours.steps[0].update.factor
    owners = {name: torch.zeros(shard.shape, dtype=torch.int64) for name, shard in shards.items()}
    for chunk in ours.moments:
        name = chunk.name.removeprefix("m/")
        region = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.tensor.shape, strict=True))
        yield compare_part(
            Difference("engine's gradients", 0.0, name), chunk.tensor / kept, plain.gradients[name], region, floor
        )
        owners[name][locate(chunk, shards[name])] += 1
    for name, count in reduce_parts(owners, shards, mesh, dist.ReduceOp.SUM).items():
        yield Difference("owners", float((count - 1).abs().sum()), name)


def restrict(plain: Trace, names: set[str]) -> Trace:
    """The plain run as far as tensors of these names go."""

    def choose(tensors: Parts) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if name in names}

    return plain._replace(initial=choose(plain.initial), gradients=choose(plain.gradients), final=choose(plain.final))


def compare_routing(case: Case, mesh: Mesh, ours: Choices, plain: Choices) -> Difference:
    """Which expert each choice of this rank's tokens fell on: the number of choices that differ."""
    places = place_sequences(case, mesh.coordinate(Axis.dp), 0)
    tokens = span(case.length, mesh.degree(Axis.sequence), mesh.coordinate(Axis.sequence))
    wrong: dict[int, int] = {}
    for (row, microbatch), choices in ours.items():
        expected = plain[row, 0][places[microbatch], tokens.start : tokens.stop]
        if choices.shape != expected.shape:
            return Difference("routing", math.inf, f"shape {tuple(choices.shape)} for {tuple(expected.shape)}")
        wrong[row] = wrong.get(row, 0) + int((choices != expected).sum())
    worst = max(wrong, key=wrong.__getitem__, default=0)
    return Difference("routing", float(sum(wrong.values())), f"router {worst}" if wrong else "")


def relate(ours: Tensor, plain: Tensor, scale: float | None = None) -> float:
    """The largest difference over ``scale``, or over the largest entry of ``plain``."""
    if ours.shape != plain.shape:
        return math.inf
    difference = float((ours - plain).abs().max()) if ours.numel() else 0.0
    if difference == 0:
        return 0.0
    scale = float(plain.abs().max()) if scale is None else scale
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf
