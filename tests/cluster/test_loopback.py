"""The test cluster of users without root: tasks, a requeue after a lost daemon, and listeners at 127.0.0.1 alone."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
from client import until
from loopback import Loopback
from needed import require
from settings import Shape


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    require(loopback.can_make())
    with Loopback(Shape(nodes=2), tmp_path_factory.mktemp("loopback")) as made:
        yield made


def test_tasks_run_on_all_nodes(cluster: Loopback) -> None:
    said = cluster.run(["srun", "-N2", "--ntasks-per-node=2", "printenv", "SLURMD_NODENAME"]).stdout
    assert sorted(said.split()) == ["n1", "n1", "n2", "n2"]
    with pytest.raises(ValueError, match="host 'n1' must be login"):
        cluster.run(["true"], "n1")
    with pytest.raises(ValueError, match="has more than 80 characters"):
        Loopback(Shape(), Path("/") / ("x" * 80))


def test_it_listens_at_the_loopback_alone(cluster: Loopback) -> None:
    said = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    ours = {f":{port}" for port in cluster.ports}
    found = {words[3] for line in said.splitlines() if (words := line.split()) and words[3].endswith(tuple(ours))}
    assert found == {f"127.0.0.1{port}" for port in ours}


@pytest.mark.full
def test_a_lost_daemon_leaves_tasks_running_and_the_job_runs_again(cluster: Loopback, tmp_path: Path) -> None:
    """What the docstring of loopback.py says of a node that crashes."""
    tick = f"--wrap=while sleep 0.1; do echo ${{SLURM_RESTART_COUNT:-0}} $SLURMD_NODENAME >>{tmp_path}/ticks; done"
    job = cluster.submit("--requeue", "--output=/dev/null", tick)
    node = cluster.wait(job, "RUNNING")["NodeList"]
    assert until(lambda: (tmp_path / "ticks").exists(), 30)
    cluster.crash(node)
    cluster.wait(job, "RUNNING", restarts=1, seconds=60)
    other = {"n1": "n2", "n2": "n1"}[node]
    seen = len((tmp_path / "ticks").read_text().splitlines())
    both = {f"0 {node}", f"1 {other}"}
    assert until(lambda: set((tmp_path / "ticks").read_text().splitlines()[seen:]) == both, 30)
    cluster.run(["scancel", job])
