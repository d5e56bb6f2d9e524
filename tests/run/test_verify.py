"""``shoestring verify`` as a user types it."""

import subprocess
from dataclasses import replace
from pathlib import Path

from small_models import make_config

from launcher import cli, verify
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case

ROOT = Path(__file__).parents[2]


def test_a_layout_is_proved() -> None:
    command = [str(ROOT / ".venv/bin/shoestring"), "verify", "run=tiny", "parallel.dp=2", "parallel.ep=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == "dp=2 tp=1 ep=2, engine native, spread"
    assert lines[-1] == "the numbers are those of the plain model"
    assert sum(line.startswith("passed  gradients ") for line in lines) == 2 and "FAILED" not in done.stdout


def test_a_layout_that_does_not_fit_is_a_mistake() -> None:
    assert cli.main(["verify", "run=tiny", "parallel.tp=3"]) == 2


def test_a_rank_that_fails_fails_the_proof() -> None:
    case = Case(Topology(tp=2), make_config(num_layers=1), OptimizerConfig(lr=1e-3))
    verdict = verify.start(replace(case, length=7))  # two ranks cannot hold equal shards of it
    assert not verdict["passed"] and "Traceback" in verdict["table"]
