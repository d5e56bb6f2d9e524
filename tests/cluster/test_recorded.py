"""What was recorded of launchers' environments is what these launchers say, where their versions are those recorded.

Names and values are compared, but for values that differ from run to run, such as ports and process numbers.
"""

import json
import re
from pathlib import Path

import pytest
from needed import require
from record import RECORDINGS, record, versions

from slurm import Cluster, lacking

RECORDED = Path(__file__).parents[1] / "unit" / "recorded"
QUICK = ("srun", "srun_in_batch", "mpirun_in_salloc")
VARIES = re.compile(
    ".*_PORT|.*_URI.*|SLURM_(ARRAY_)?JOB_?ID|SLURM_TASK_PID|SLURM_PRIO_PROCESS|TORCHELASTIC_RUN_ID"
    "|PMIX_(ID|NAMESPACE)|OMPI_MCA_(ess_base_jobid|orte_.*_uri|orte_precondition_transports)"
)


def test_every_recording_has_a_file() -> None:
    assert {path.stem for path in RECORDED.glob("*.json")} == set(RECORDINGS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.full]) for name in RECORDINGS]
)
def test_launchers_say_what_was_recorded(cluster: Cluster, name: str, tmp_path: Path) -> None:
    require(lacking({"mpirun": "openmpi-bin"}))
    was = json.loads((RECORDED / f"{name}.json").read_text())
    if (here := versions(cluster)) != was["versions"]:
        pytest.skip(f"recorded with {was['versions']}, here are {here}")
    now = record(cluster, name, tmp_path)
    assert now["command"] == was["command"]
    assert [steady(process) for process in now["processes"]] == [steady(process) for process in was["processes"]]


def steady(process: dict) -> tuple[str, dict[str, str | None]]:
    """A recorded process without the values that differ from run to run."""
    values = process["environment"].items()
    return process["host"], {name: None if VARIES.fullmatch(name) else value for name, value in values}
