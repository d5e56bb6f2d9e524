"""A node's power is cut, or its cable: the verdict names it, the run goes on elsewhere, with the losses that it had."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from client import until
from needed import require
from settings import Shape
from trained import LONG, SECONDS, expect, read_output, read_state, steps_of, submit, wait_for_end, wait_for_step

import slurm
from slurm import Cluster

KILLED_BEFORE = ("health.faults=['0:8:forward:kill']",)


def in_a_step(run: Path) -> None:
    wait_for_step(run, 8)


def while_loading(run: Path) -> None:
    """Ranks have been started again, and are being set up."""
    wait_for_step(run, 5)
    assert until(lambda: "goes on after step" not in read_output(run) and _acts(run, "setting up"), SECONDS)


def _acts(run: Path, action: str) -> bool:
    beat = run / "logs" / "rank2" / "heartbeat.json"
    return beat.exists() and action in json.loads(beat.read_text())["action"]


WHEN = [
    pytest.param(in_a_step, (), 1, id="in a step", marks=pytest.mark.full),
    pytest.param(while_loading, KILLED_BEFORE, 2, id="while loading", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("wait", "words", "starts"), WHEN)
def test_a_node_that_is_lost_is_replaced_inside_the_job(
    cluster: Cluster, folder: Path, wait: Callable[[Path], None], words: tuple[str, ...], starts: int
) -> None:
    run = folder / "runs" / f"spare-{starts}"
    job = submit(cluster, folder, run.name, *LONG, "cluster.spares=1", *words)
    wait(run)
    cluster.crash("n2")
    said = wait_for_end(cluster, run, job)
    assert "rank 2 on n2 was lost with its node" in said and said.count("ranks start on n1, n2") == starts, said
    assert "ranks start on n1, n3" in said and read_state(run)["attempt"] == 0, said
    assert steps_of(run) == expect(folder)


@pytest.mark.full
def test_a_node_that_is_lost_without_a_spare_costs_a_requeue(cluster: Cluster, folder: Path) -> None:
    run, job = folder / "runs" / "lost", submit(cluster, folder, "lost", *LONG)
    wait_for_step(run, 8)
    cluster.crash("n1")  # with the supervisor on it
    cluster.wait(job, "RUNNING", restarts=1, seconds=SECONDS)
    wait_for_end(cluster, run, job)
    assert steps_of(run) == expect(folder), read_output(run)


@pytest.mark.full
def test_a_node_that_slurm_believes_in_is_found_lost_by_its_silence(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As on most clusters, where a node that says nothing is down after five minutes."""
    require(slurm.can_make())
    with Cluster(Shape(nodes=3, gpus=2, patience=300), tmp_path_factory.mktemp("patient")) as cluster:
        run, job = folder / "runs" / "silent", submit(cluster, folder, "silent", *LONG, "cluster.spares=1")
        wait_for_step(run, 8)
        cluster.crash("n2")
        # The job's own end waits for a word from every node.
        assert until(lambda: read_state(run)["state"] == "finished", SECONDS), read_output(run)
        said = read_output(run)
        assert "rank 2 on n2 was lost with its node" in said and "ranks start on n1, n3" in said, said
        assert "DOWN" not in cluster.show_node("n2")["State"] and cluster.show(job)["Restarts"] == "0"
        assert steps_of(run) == expect(folder)
