"""Proves a case on ranks of its own. Every rank loads this file, so it draws no cases, which takes a second.

The plain run is the same for all ranks: it is taken once, here, and sent to them.
"""

import torch
from layouts import describe
from spawn import run_ranks

from parallel.mesh import Mesh
from training.proof.case import Case
from training.proof.plain import Reference, trace_plain
from training.proof.prove import prove
from training.proof.report import Report


def prove_on_rank(rank: int, world: int, case: Case, reference: Reference) -> Report:
    """What this rank reports."""
    return prove(case, Mesh(case.topology, torch.device("cpu")), reference)


def check(case: Case) -> None:
    """Raises AssertionError unless the case passes, and every rank says so in the same words."""
    reports = run_ranks(prove_on_rank, case.topology.world, case, trace_plain(case))
    assert reports[0].passed, f"{describe(case)}\n{reports[0]}"
    assert all(report == reports[0] for report in reports)
