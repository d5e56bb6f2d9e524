"""The verdict: what was compared, the largest difference found, and what is allowed.

    exact              initial weights, data order, routing, token counts, selection biases, replicas, owners
    of the value       loss and its parts, gradient norm, clip factor
    of a tensor        each gradient against its own largest entry, or a hundredth of the model's largest gradient where
                       that is more; each weight against its largest entry

A difference is |ours - plain| / scale; a NaN or a wrong shape counts as infinite.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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


def summarise(found: Sequence[Difference]) -> Iterator[Row]:
    """One row a kind, in the order of ``LIMITS``."""
    for what, limit in LIMITS.items():
        same = [difference for difference in found if difference.what == what]
        worst = max(same, key=lambda difference: difference.size)
        yield Row(what, worst.size, limit, worst.where, len(same))
