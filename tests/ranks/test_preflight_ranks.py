"""Machines checked for real: four ranks, each a machine of its own name, and something wrong with one of them."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any, NamedTuple

import pytest
from nvml_library import build, load
from small_models import make_config
from spawn import run_ranks

from configs.preflight import OnFailure, PreflightConfig
from configs.schema import RunConfig
from launcher.discover import Rank
from launcher.preflight.check import open_preflight
from launcher.preflight.unfit import UnfitError
from training.config import CheckpointConfig, OptimizerConfig, RunSection
from training.data.config import DataConfig

WORLD = 4
SLOW = 20.0  # these machines share two processors: only what is much slower is slow
HANDICAP = 1.0  # seconds that each product of the slow rank takes longer


class Outcome(NamedTuple):
    """What a rank came to."""

    printed: str
    refused: str  # why the run does not start


def check(rank: int, world: int, folder: Path, wrong: str, how: dict[str, Any], library: Path | None) -> Outcome:
    """All checks, as a rank on machine n<rank>, of which n2 has something ``wrong`` with it."""
    from torch import device
    from torch.distributed import FileStore

    from parallel.mesh import Mesh
    from parallel.topology import Topology

    os.environ["SLURMD_NODENAME"] = f"n{rank}"
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    config = RunConfig(
        model=make_config(vocab_size=264),
        data=DataConfig(sequence_length=16),
        optimizer=OptimizerConfig(lr=1e-3),
        run=RunSection(name="small", steps=1, global_batch=8, micro_batch=1, threads=1),
        checkpoint=CheckpointConfig(folder=str(folder / "checkpoints")),
        preflight=PreflightConfig(slow=SLOW, **how),
    )
    if library is not None:
        load(library, folder / ("n2.txt" if rank == 2 and wrong == "device" else "others.txt"))
    if rank == 2 and wrong in SPOIL:
        SPOIL[wrong]()
    store, printed = FileStore(str(folder / "desk"), world), StringIO()
    with redirect_stdout(printed):
        try:
            preflight = open_preflight(config, Rank(rank, world, 0, 1), store, folder)
            assert preflight is not None
            preflight.check_machines()
            preflight.check_network(Mesh(Topology(dp=world), device("cpu")))
        except UnfitError as error:
            return Outcome(printed.getvalue(), str(error))
        finally:
            sys.setprofile(None)
    return Outcome(printed.getvalue(), "")


def slow_products() -> None:
    """From now on this process multiplies slowly."""

    def look(frame: FrameType, event: str, function: object) -> None:
        if event == "c_call" and getattr(function, "__name__", "") == "mm":
            time.sleep(HANDICAP)

    sys.setprofile(look)


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def limit_disk() -> None:
    """No file of this process may be larger than a MiB, as where a quota is used up."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


SPOIL = {"product": slow_products, "files": limit_files, "disk": limit_disk}
FOUND = {
    "product": "n2, rank 2: product: ",
    "files": "n2: open files: 512, should be at least 1,088",
    "disk": "n2: writing: File too large in ",
}


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder in memory: how fast a disk is that tests share says nothing here."""
    with TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def run(folder: Path, wrong: str = "", library: Path | None = None, **how: Any) -> list[Outcome]:
    return run_ranks(check, WORLD, folder, wrong, how, library)


def find(outcome: Outcome) -> list[str]:
    """The lines that name somebody."""
    return [line for line in outcome.printed.splitlines() if line.startswith("n")]


@pytest.mark.parametrize("wrong", SPOIL)
def test_the_machine_with_something_wrong_is_named_and_the_run_does_not_start(shared: Path, wrong: str) -> None:
    outcomes = run(shared, wrong)
    (line,) = find(outcomes[0])
    assert line.startswith(FOUND[wrong])
    said = "preflight: 1 finding, machine n2 unfit: see above; preflight.on_failure=warn starts all the same"
    assert [outcome.refused for outcome in outcomes] == [said] * WORLD
    assert not any(outcome.printed for outcome in outcomes[1:])
    assert not (shared / "excluded.json").exists()
    assert not any(path.name.startswith(".preflight") for path in shared.rglob("*"))  # what was written is gone


def test_nothing_is_wrong_with_healthy_machines(shared: Path) -> None:
    outcomes = run(shared)
    assert [outcome.refused for outcome in outcomes] == [""] * WORLD
    (line,) = outcomes[0].printed.splitlines()
    assert line.startswith("preflight: 4 machines, ") and " checks, 0 findings, " in line


def test_a_warning_stops_nothing(shared: Path) -> None:
    outcomes = run(shared, "files", on_failure=OnFailure.warn)
    assert find(outcomes[0]) == [FOUND["files"]] and [outcome.refused for outcome in outcomes] == [""] * WORLD
    table = outcomes[0].printed
    assert "FAILED  open files" in table and "ok      sending" in table and "ok      latency of dp" in table


def test_devices_are_named_and_machines_excluded(shared: Path) -> None:
    """Each machine has a driver of its own; an earlier attempt has excluded another machine."""
    library = build(shared)
    (shared / "others.txt").write_text("system devices 2\n")
    (shared / "n2.txt").write_text("system devices 2\nsystem driver 570.12\n1 lost 1\n0 link3 0\n")
    (shared / "excluded.json").write_text('{"n9": "device 0: device: has fallen off the bus"}')
    outcomes = run(shared, "device", library, on_failure=OnFailure.exclude)
    found = [
        "n2, device 1: device: has fallen off the bus",
        "n2, device 0: links: 17 NVLinks up, others 18 NVLinks up",
        "n2: version of driver: 570.12, 580.65.06 on 3 of 4",
    ]
    assert find(outcomes[0]) == found
    said = "preflight: 3 findings, machine n2 unfit: named in excluded.json, for the next attempt to do without"
    assert [outcome.refused for outcome in outcomes] == [said] * WORLD
    assert json.loads((shared / "excluded.json").read_text()) == {
        "n9": "device 0: device: has fallen off the bus",
        "n2": "; ".join(line.removeprefix("n2: ").removeprefix("n2, ") for line in found),
    }
