"""Two nodes, and all that goes wrong with ranks: whose fault it was is said first, on which node, and the run goes on.

Faults are ``health.faults``, as `shoestring torture` draws them; each happens once. Most end all ranks, and the job
starts them again: the n-th verdict is that of the n-th fault. Nodes that are lost: test_lost_nodes.py.
"""

import re
from pathlib import Path

import pytest
from client import until
from trained import SECONDS, read_output, read_rows, submit, write_text

from launcher.campaign import SIGNS
from slurm import Cluster
from training.health.config import FailAt, Fault, Phase

VERDICT = re.compile(r"^shoestring: (rank \d+ on n\d .*|ranks were told to stop.*)$", re.MULTILINE)
FATAL = (Fault.kill, Fault.error, Fault.peer, Fault.flip, Fault.stop, Fault.term, Fault.segv, Fault.exit, Fault.stuck)
PHASES = (Phase.forward, Phase.backward)
ENDURED = (  # of two phases each, but for NaN, which gradients alone have
    FailAt(1, 3, Phase.backward, Fault.nan),
    FailAt(2, 5, Phase.backward, Fault.nan),
    FailAt(3, 7, Phase.writing, Fault.full),
    FailAt(0, 10, Phase.committing, Fault.full),
    FailAt(1, 13, Phase.writing, Fault.write),
    FailAt(0, 16, Phase.committing, Fault.write),
    FailAt(2, 19, Phase.forward, Fault.slow),
    FailAt(1, 40, Phase.optimizer, Fault.slow),
)
HANG = "health.hang=15"  # other tests may run beside
HEALTH = ("health.verify_every=1", "checkpoint.every=2", "run.restarts=9", "run.steps=40")


def list_faults() -> list[FailAt]:
    """Each kind in each phase, on a rank of each node in turn, two steps apart."""
    pairs = [(kind, phase) for kind in FATAL for phase in PHASES]
    return [FailAt((number * 3 + 1) % 4, 3 + 2 * number, phase, kind) for number, (kind, phase) in enumerate(pairs)]


def describe(fault: FailAt) -> str:
    """What is said of it."""
    if fault.kind is Fault.term:
        return "ranks were told to stop"
    sign = SIGNS[fault.kind].format(rank=fault.rank)
    if fault.kind in (Fault.stop, Fault.stuck, Fault.flip):
        return sign  # others say it of that rank, or it says it of itself
    return sign.replace(f"rank {fault.rank} ", f"rank {fault.rank} on n{fault.rank // 2 + 1} ").replace(
        r"rank \d+ ", r"rank \d+ on n\d "
    )


@pytest.mark.full
@pytest.mark.timeout(1300)
def test_the_first_cause_is_named(cluster: Cluster, tmp_path: Path) -> None:
    write_text(tmp_path)
    undisturbed, disturbed = tmp_path / "runs" / "undisturbed", tmp_path / "runs" / "disturbed"
    job = submit(cluster, tmp_path, "undisturbed", HANG, *HEALTH)
    cluster.wait(job, "COMPLETED", seconds=SECONDS)
    faults = list_faults()
    texts = ",".join(f"'{fault}'" for fault in faults)
    job = submit(cluster, tmp_path, "disturbed", HANG, *HEALTH, f"health.faults=[{texts}]")
    ended = until(lambda: cluster.show(job)["JobState"] in ("COMPLETED", "FAILED"), 5 * SECONDS)
    said = (disturbed / f"job-{job}.out").read_text()
    assert ended, said
    verdicts = VERDICT.findall(said)
    assert len(verdicts) == len(faults), said
    for fault, verdict in zip(faults, verdicts, strict=True):
        assert re.search(describe(fault), verdict), (fault, verdicts)
    assert read_rows(disturbed) == read_rows(undisturbed)


@pytest.mark.full
@pytest.mark.timeout(600)
def test_what_ends_no_rank_is_said_of_the_right_one(cluster: Cluster, tmp_path: Path) -> None:
    write_text(tmp_path)
    words = ("run.steps=60", "checkpoint.every=2", "checkpoint.save=true", "health.window=1.5")
    texts = ",".join(f"'{fault}'" for fault in ENDURED)
    run, job = tmp_path / "runs" / "endured", submit(cluster, tmp_path, "endured", *words, f"health.faults=[{texts}]")
    cluster.wait(job, "COMPLETED", seconds=2 * SECONDS)
    said = read_output(run)
    lines = [
        line
        for line in said.splitlines()
        if any(re.search(SIGNS[fault.kind].format(rank=r"\d+"), line) for fault in ENDURED)
    ]
    for fault in ENDURED:
        sign = re.compile(SIGNS[fault.kind].format(rank=fault.rank))
        line = next((line for line in lines if sign.search(line)), None)
        assert line is not None, (fault, said)
        lines.remove(line)
    assert said.count("ranks start on") == 1 and not VERDICT.search(said), said
