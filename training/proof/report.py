"""The verdict: what was compared, the largest difference found, and what is allowed.

    exact              initial weights, routing, token counts, selection biases, and equal replicas
    of the value       loss and its parts, gradient norm, clip factor
    of a tensor        each gradient against its own largest entry, or a hundredth of the model's largest gradient where
                       that is more; each weight against its largest entry

A difference is |ours - plain| / scale; a NaN or a wrong shape counts as infinite.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.build import Region
from parallel.mesh import Mesh, Traffic
from parallel.placement import Shard, span
from parallel.topology import Axis
from training.proof.case import Case
from training.proof.trace import Reference, Step, Trace, place_sequences, reduce_parts, trace_plain, trace_sharded

LIMITS = {
    "initial weights": 0.0,
    "routing": 0.0,
    "token counts": 0.0,
    "selection biases": 0.0,
    "replicas": 0.0,
    "owners": 0.0,
    "loss": 1e-12,
    "cross entropy": 1e-12,
    "auxiliary loss": 1e-12,
    "gradients": 1e-10,
    "engine's gradients": 1e-10,
    "gradient norm": 1e-10,
    "clip factor": 1e-10,
    "weights": 1e-9,
}
CASTS = {
    "deepspeed": 1e-5
}  # engines that cast gradients or weights to float32 by themselves, and what they are held to
CAST = ("loss", "cross entropy", "auxiliary loss", "gradient norm", "clip factor", "weights")


class Difference(NamedTuple):
    """One number or tensor against the plain one."""

    what: str  # a key of LIMITS
    size: float
    where: str


class Row(NamedTuple):
    """All differences of a kind: the largest, and where it is."""

    what: str
    worst: float
    limit: float
    where: str
    compared: int  # numbers and tensors, over all ranks

    @property
    def passed(self) -> bool:
        return self.worst <= self.limit


class Report(NamedTuple):
    """What a proof found; the same on every rank."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        lines = [
            f"{'passed' if row.passed else 'FAILED':8}{row.what:18}{row.worst:10.1e} of {row.limit:7.0e}   {row.where}"
            for row in self.rows
        ]
        return "\n".join(lines)


def prove(case: Case, mesh: Mesh) -> Report:
    """Runs the case on this rank and on the plain model. Collective over all ranks of ``mesh``."""
    reference = trace_plain(case)
    trace, shards = trace_sharded(case, mesh, reference.start)
    found = list(compare(case, mesh, reference, trace, shards))
    everyone: list[list[Difference]] = [[] for _ in range(mesh.topology.world)]
    dist.all_gather_object(everyone, found, group=mesh.group(Axis.world, Traffic.control))
    return Report(tuple(summarise([difference for rank in everyone for difference in rank], case.engine)))


def compare(
    case: Case, mesh: Mesh, reference: Reference, trace: Trace, shards: Mapping[str, Shard]
) -> Iterator[Difference]:
    """Everything this rank can say."""
    plain = reference.trace
    yield from compare_tensors("initial weights", trace.initial, plain.initial, shards)
    yield compare_routing(case, mesh, trace.routing, plain.routing)
    floor = max((float(gradient.abs().max()) for gradient in plain.gradients.values()), default=0.0) / 100
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
    yield Difference("loss", relate(ours.loss, plain.loss), where)
    yield Difference("cross entropy", relate(ours.sums, plain.sums), where)
    yield Difference("auxiliary loss", relate(ours.aux, plain.aux), where)
    yield Difference("token counts", relate(ours.load, plain.load), where)
    norms, factors = ([torch.tensor(getattr(run.update, of)) for run in (ours, plain)] for of in ("norm", "factor"))
    yield Difference("gradient norm", relate(norms[0], norms[1]), where)
    yield Difference("clip factor", relate(factors[0], factors[1]), where)


def compare_tensors(
    what: str, ours: Mapping[str, Tensor], plain: Mapping[str, Tensor], shards: Mapping[str, Shard], floor: float = 0.0
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
    ratio = float((ours * part).sum() / part.square().sum())
    return named._replace(size=size, where=f"{named.where}, {ratio:.6g} times the plain one")


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
        corner = shards[name].offset
        owners[name][tuple(slice(r.start - o, r.stop - o) for r, o in zip(region, corner, strict=True))] += 1
    for name, count in reduce_parts(owners, shards, mesh, dist.ReduceOp.SUM).items():
        yield Difference("owners", float((count - 1).abs().sum()), name)


def compare_routing(case: Case, mesh: Mesh, ours: Tensor, plain: Tensor) -> Difference:
    """Which expert each choice of this rank's tokens fell on [L, n, s, K]: the number of choices that differ."""
    places = place_sequences(case, mesh.coordinate(Axis.dp))
    tokens = span(case.length, mesh.degree(Axis.sequence), mesh.coordinate(Axis.sequence))
    expected = torch.cat([plain[:, place] for place in places], dim=1)[:, :, tokens.start : tokens.stop]
    if ours.shape != expected.shape:
        return Difference("routing", math.inf, f"shape {tuple(ours.shape)} for {tuple(expected.shape)}")
    wrong = (ours != expected).flatten(1).sum(1)
    return Difference("routing", float(wrong.sum()), f"router {int(wrong.argmax())}" if len(wrong) else "")


def relate(ours: Tensor, plain: Tensor, scale: float | None = None) -> float:
    """The largest difference over ``scale``, or over the largest entry of ``plain``."""
    if ours.shape != plain.shape:
        return math.inf
    difference = float((ours - plain).abs().max()) if ours.numel() else 0.0
    if difference == 0:
        return 0.0
    scale = float(plain.abs().max()) if scale is None else scale
    return difference / scale if scale > 0 and math.isfinite(difference) else math.inf


def summarise(found: Sequence[Difference], engine: str) -> Iterator[Row]:
    """One row a kind, in the order of ``LIMITS``."""
    for what, limit in LIMITS.items():
        same = [difference for difference in found if difference.what == what]
        worst = max(same, key=lambda difference: difference.size)
        limit = max(limit, CASTS.get(engine, 0.0)) if what in CAST else limit
        yield Row(what, worst.size, limit, worst.where, len(same))
