"""The verdict: what was compared, the largest difference found, and what is allowed.

    exact              initial weights, data order, routing, token counts, selection biases, replicas, owners
    of the value       loss and its parts, gradient norm, clip factor
    of a tensor        each gradient against its own largest entry, or a hundredth of the model's largest gradient where
                       that is more; each weight against its largest entry

A difference is |ours - plain| / scale; a NaN or a wrong shape counts as infinite.

Engines of DeepSpeed sum gradients, update and clip in float32. The first step up to its gradients knows no engine and
is held to the limits of float64; what an engine has had a part in, losses of the steps after the first among it, to
``ROUNDED``. Which tokens went where stays exact: a weight that is off by 1e-7 swaps no two experts of a small proof.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from parallel.config import EngineName
from training.support import DEEPSPEED

LIMITS = {
    "initial weights": 0.0,
    "data order": 0.0,
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
ROUNDED = 1e-5
OPTIONAL = ("selection biases",)  # a model without routers has none
BEHIND_ENGINE = (
    "cross entropy",
    "auxiliary loss",
    "engine's gradients",
    "gradient norm",
    "clip factor",
    "weights",
)


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
        lines = [f"{'':8}{'compared':20}{'difference':>10} {'allowed':>8}   {'where':44}of"]
        lines += [
            f"{'passed' if row.passed else 'FAILED':8}{row.what:20}{row.worst:10.1e} {row.limit:8.0e}   "
            f"{row.where:44}{row.compared}"
            for row in self.rows
        ]
        return "\n".join(lines)


def allow(engine: EngineName) -> dict[str, float]:
    """What may differ by how much when ``engine`` takes the steps."""
    return LIMITS | (dict.fromkeys(BEHIND_ENGINE, ROUNDED) if engine in DEEPSPEED else {})


def summarise(found: Sequence[Difference], limits: Mapping[str, float]) -> Iterator[Row]:
    """One row a kind, in the order of ``limits``. A kind of which nothing was compared fails."""
    for what, limit in limits.items():
        same = [difference for difference in found if difference.what == what]
        if same or what not in OPTIONAL:
            worst = max(same, key=lambda difference: difference.size, default=Difference(what, math.inf, "nothing"))
            yield Row(what, worst.size, limit, worst.where, len(same))
