"""``shoestring verify`` as a user types it."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import make_config

from launcher import cli, proofs, trial
from parallel.config import EngineName
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.report import BEHIND_ENGINE, ROUNDED
from training.support import DEEPSPEED

ROOT = Path(__file__).parents[2]
ADAM = OptimizerConfig(lr=1e-3, clip=0.3)


@pytest.mark.parametrize("engine", ["native", pytest.param("zero1", marks=pytest.mark.full)])
def test_a_layout_is_proved_and_recorded(engine: str, tmp_path: Path) -> None:
    layout = ["parallel.dp=2", "parallel.ep=2", f"parallel.engine={engine}"]
    command = [str(ROOT / ".venv/bin/shoestring"), "verify", "run=tiny", *layout, f"proofs={tmp_path / 'kept'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == f"dp=2 tp=1 ep=2, engine {engine}, spread" and "FAILED" not in done.stdout
    assert sum(line.startswith("passed  gradients ") for line in lines) == 2
    (path,) = (tmp_path / "kept").iterdir()
    said = ["the numbers are those of the plain model", f"recorded as {path.stem[:12]} in {path.parent}"]
    proof = proofs.find(path.parent, path.stem)
    assert lines[-2:] == said and proof is not None and len(proof.cases) == 2
    assert (proof.engine, proof.topology["ep"], "deepspeed" in proof.versions) == (engine, 2, engine == "zero1")


def test_engines_of_deepspeed_are_held_to_rounding_and_what_comes_before_them_is_not() -> None:
    """Experts folded over tp; half of the cases crowded. What is rounded, is: these engines do take the steps."""
    case = Case(Topology(dp=2, tp=2, ep=4), make_config(num_layers=2, moe={"experts": 8, "groups": 4}), ADAM)
    cases = {engine: replace(case, engine=engine, crowded=engine is EngineName.zero2) for engine in DEEPSPEED}
    for engine, verdict in trial.start(cases).items():
        assert verdict.passed, f"{engine}\n{verdict}"
        rows = {row.what: row for row in verdict.rows}
        assert {what for what, row in rows.items() if row.limit == ROUNDED} == set(BEHIND_ENGINE)
        assert rows["gradients"].limit == 1e-10 and rows["loss"].limit == 1e-12 and rows["routing"].limit == 0
        assert all(rows[what].worst > 1e-9 for what in ("engine's gradients", "weights"))


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
    case = Case(Topology(tp=2), make_config(num_layers=1), ADAM, steps=1)
    # In the second case two ranks cannot hold equal shards of a sequence.
    verdicts = trial.start({"good": case, "bad": replace(case, length=7), "never run": case})
    assert verdicts["good"].passed
    assert not verdicts["bad"].passed and "Traceback" in str(verdicts["bad"])
    assert not verdicts["never run"].passed and str(verdicts["never run"]) == "not proved: a rank had failed"
