"""``shoestring verify`` as a user types it."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import make_config

from launcher import cli, proofs, trial
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("engine", ["native", "zero1", "zero2"])
def test_a_layout_is_proved_and_recorded(engine: str, tmp_path: Path) -> None:
    layout = ["parallel.dp=2", "parallel.ep=2", f"parallel.engine={engine}"]
    command = [str(ROOT / ".venv/bin/shoestring"), "verify", "run=tiny", *layout, f"proofs={tmp_path / 'kept'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == f"dp=2 tp=1 ep=2, engine {engine}, spread"
    assert lines[-2] == "the numbers are those of the plain model" and lines[-1].startswith("recorded as ")
    allowed = {line.split("  ")[1].strip(): line.split()[-4:-1] for line in lines if line.startswith("passed")}
    assert sum(line.startswith("passed  gradients ") for line in lines) == 2 and "FAILED" not in done.stdout
    rounded = engine != "native"
    assert ("1e-05" in allowed["weights"]) == rounded and "1e-10" in allowed["gradients"]
    (path,) = (tmp_path / "kept").iterdir()
    proof = proofs.find(path.parent, path.stem)
    assert proof is not None and (proof.engine, proof.topology["ep"]) == (engine, 2)
    assert set(proof.versions) == ({"torch", "deepspeed"} if rounded else {"torch"}) and len(proof.cases) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=3"], "parallel.tp=3 must divide model.attention.heads"),
        (["parallel.tp=32", "model.attention.heads=32", "data.sequence_length=64"], "must be at most 16 to be proved"),
    ],
)
def test_a_layout_that_does_not_fit_is_a_mistake(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", *words]) == 2
    assert message in capsys.readouterr().err


def test_under_a_launcher_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["verify", "parallel.dp=2"]) == 2
    assert "RANK in the environment: shoestring verify starts ranks of its own" in capsys.readouterr().err


def test_a_rank_that_fails_fails_the_proof() -> None:
    case = Case(Topology(tp=2), make_config(num_layers=1), OptimizerConfig(lr=1e-3), steps=1)
    # In the second case two ranks cannot hold equal shards of a sequence.
    verdicts = trial.start({"good": case, "bad": replace(case, length=7)})
    assert verdicts["good"].passed
    assert not verdicts["bad"].passed and "Traceback" in str(verdicts["bad"])
