"""Machines checked on a cluster: two nodes, ranks that srun starts, and one node with something wrong with it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from client import until
from trained import SECONDS, read_output, read_state, submit, write_text

from slurm import Cluster

PREFLIGHT = [sys.executable, "-m", "launcher.preflight", "run.threads=1", "preflight.slow=50"]
RATE = "tc qdisc replace dev wire root tbf rate 20mbit burst 32kb latency 400ms"


@pytest.fixture
def two(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster; what was done to the second node's link is undone."""
    yield cluster
    cluster.run(["tc", "qdisc", "del", "dev", "wire", "root"], "n2", check=False)


def check(cluster: Cluster, folder: Path, nodes: int = 2) -> subprocess.CompletedProcess[str]:
    """`shoestring preflight` on a rank of each of so many nodes."""
    names = ",".join(cluster.nodes[:nodes])
    srun = [
        "srun",
        f"-N{nodes}",
        "--ntasks-per-node=1",
        f"--nodelist={names}",
        *PREFLIGHT,
        "run.global_batch=12",
        "run.micro_batch=2",
    ]
    return cluster.run(srun, cwd=folder, check=False, timeout=240)


@pytest.mark.parametrize("nodes", [2, pytest.param(3, marks=pytest.mark.full)])
def test_a_slow_link_is_named(two: Cluster, tmp_path: Path, nodes: int) -> None:
    two.run(RATE.split(), "n2")
    done = check(two, tmp_path, nodes)
    named = [line for line in done.stdout.splitlines() if line.startswith("n")]
    assert done.returncode and len(named) == 1 and named[0].startswith("n2: sending: "), done.stdout + done.stderr
    assert "preflight: 1 finding, machine n2 unfit" in done.stderr


def test_two_healthy_nodes_pass(two: Cluster, tmp_path: Path) -> None:
    done = check(two, tmp_path)
    assert not done.returncode and "preflight: 2 machines, " in done.stdout, done.stdout + done.stderr
    assert not any((tmp_path / "runs").iterdir())


@pytest.mark.full
@pytest.mark.parametrize("spares", [1, 0])
def test_a_submitted_run_does_without_a_node_that_is_unfit(two: Cluster, tmp_path: Path, spares: int) -> None:
    """With a spare inside the job; without one in the next, which is never given that node, however slow Slurm is."""
    write_text(tmp_path)
    two.run(RATE.split(), "n2")
    slow = tmp_path / "slow" / "scontrol"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/bash\n[ "$1" = update ] && sleep 2\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    words = ("preflight.when=auto", "preflight.on_failure=exclude", "preflight.slow=50", f"cluster.spares={spares}")
    words += (f"cluster.setup=['export PATH={slow.parent}:$PATH']",)
    run, job = tmp_path / "runs" / "fit", submit(two, tmp_path, "fit", *words)
    assert until(lambda: read_state(run)["state"] == "finished", SECONDS), read_output(run)
    said = read_output(run)
    assert said.count("ranks start on n1, n2") == 1 and said.count("ranks start on ") == 2, said
    assert list(json.loads((run / "excluded.json").read_text())) == ["n2"]
    assert read_state(run)["attempt"] == (0 if spares else 1)
    assert spares or two.show(job)["ExcNodeList"] == "n2"
