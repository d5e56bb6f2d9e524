"""What tests share: a cluster of four nodes, made when the first test asks for it, cleared after each; and a run."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from needed import require
from settings import Shape
from trained import LONG, SECONDS, TRAIN, write_text

import slurm
from slurm import Cluster


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    require(slurm.can_make())
    with Cluster(Shape(nodes=4, gpus=2), tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Nodes n1 to n4, each with 4 CPUs and 2 devices called gpu; after the test no job is left and all nodes are up."""
    yield shared_cluster
    shared_cluster.clear()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see, with a text, and ``runs/long``: 40 steps on this machine, no cluster."""
    folder = tmp_path_factory.mktemp("runs")
    write_text(folder)
    done = subprocess.run([*TRAIN, "run.id=long", *LONG], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert not done.returncode, done.stdout + done.stderr
    return folder
