"""Runs of two ranks and the proof they start with: made, found, demanded, or failed in a program that is broken."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from test_ranks import TORCHRUN, TRAIN
from test_train import SMALL

from launcher import cli, gate, proofs
from launcher.compose import Composer
from launcher.invocation import Invocation
from launcher.ranks import check_layout
from launcher.trial import Verdict
from training.proof.report import Row
from training.proof.shrink import shrink

WORDS = [
    "data.corpus=[text.txt]",
    *SMALL,
    "precision=fp32",
    "parallel.ep=2",
    "checkpoint.save=false",
    "run.steps=2",
    "run.sample.tokens=0",
]
LAYOUT = "dp=2 tp=1 ep=2, engine native"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} foxes jump over lazy dogs\n" for i in range(900)))
    return folder


@pytest.fixture(scope="module")
def proved(folder: Path) -> subprocess.CompletedProcess[str]:
    """What a run started by itself prints, where its layout had no proof; it has one now, in ``folder/kept``."""
    return train(folder, TRAIN, "proofs=kept", "run.id=own")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, and this process is in it."""
    monkeypatch.chdir(folder)
    return folder


def train(folder: Path, start: list[str], *overrides: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in ``folder`` on two ranks, the second of them by ``dp`` where nobody else starts it."""
    dp = [] if start is TORCHRUN else ["parallel.dp=2"]
    command = [*start, *WORDS, *dp, *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def find_only(folder: Path) -> proofs.Proof:
    """The proof in ``folder``."""
    (path,) = folder.iterdir()
    proof = proofs.find(folder, path.stem)
    assert proof is not None
    return proof


def check_proved_first(done: subprocess.CompletedProcess[str], run: Path, kept: Path) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    first, second, *_ = done.stdout.splitlines()
    proof = find_only(kept)
    rule = rf"{LAYOUT} has no proof yet: proving it \.\.\. passed in \d+\.\d s, recorded as {proof.hash[:12]} in .*kept"
    assert re.fullmatch(rule, first) and second == f"run runs/{run.name}" and done.stdout.count("proving it") == 1
    started = json.loads((run / "proof.json").read_text())
    assert (started["verify"], started["unproved"]) == ("auto", [])
    assert (started["hash"], started["date"]) == (proof.hash, proof.date)


def test_a_run_without_a_proof_makes_one_first(proved: subprocess.CompletedProcess[str], folder: Path) -> None:
    check_proved_first(proved, folder / "runs" / "own", folder / "kept")


@pytest.mark.full
def test_under_torchrun_rank_0_proves_while_the_others_wait(folder: Path, tmp_path: Path) -> None:
    done = train(folder, TORCHRUN, f"proofs={tmp_path / 'kept'}", "run.id=theirs")
    check_proved_first(done, folder / "runs" / "theirs", tmp_path / "kept")


def ask(*words: str, world: int | None = None) -> dict[str, Any] | None:
    """What a run of these words keeps of its proof; ``world``: as many ranks as a launcher started."""
    config, yaml = Composer().compose(words)
    return gate.admit(config, check_layout(config, world), Invocation("train", (), words, yaml))


def test_a_run_of_the_same_class_finds_the_proof(
    proved: subprocess.CompletedProcess[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [*WORDS, "parallel.dp=2", "proofs=kept", "optimizer.lr=1e-2", "run.seed=5", "model.hidden=64"]
    key = find_only(Path("kept")).hash
    for verify in ("auto", "require"):
        found = ask(*same, f"verify={verify}")
        assert found is not None and (found["verify"], found["hash"]) == (verify, key)
        assert capsys.readouterr().out.startswith(f"{LAYOUT}: proof {key[:12]} of 2")
    assert ask(*same, "verify=skip") == {"verify": "skip"}
    assert capsys.readouterr().out == f"verify=skip: {LAYOUT} starts without a proof\n"
    with pytest.raises(ValueError, match=r"verify=require: dp=2 tp=1 ep=2, engine native has no proof in kept"):
        ask(*same, "verify=require", "model.moe.score=softmax")


def test_require_says_how_to_make_a_proof(
    proved: subprocess.CompletedProcess[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*WORDS, "parallel.dp=2", "proofs=none yet", "run.id=refused", "verify=require"]
    assert cli.main(["train", *asked]) == 2
    assert not Path("runs/refused").exists() and not Path("none yet").exists()
    (said,) = capsys.readouterr().err.splitlines()
    rule, _, command = said.partition("; this makes one: ")
    assert rule == f"shoestring: verify=require: {LAYOUT} has no proof in none yet"
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("shoestring", "verify") and "verify=require" not in words
    config, _ = Composer().compose(tuple(words))
    shrunk = shrink(config, check_layout(config, None))
    assert (config.proofs, proofs.identify(shrunk.cases)) == ("none yet", find_only(Path("kept")).hash)


def test_a_launcher_s_world_becomes_a_degree_of_that_command() -> None:
    with pytest.raises(ValueError, match=r"this makes one: shoestring verify .* proofs=nowhere parallel\.dp=2$"):
        ask(*WORDS, "proofs=nowhere", "verify=require", world=2)


def break_program(folder: Path) -> None:
    """A copy of the program in which sums over ranks count twice what there is."""
    for room in ("configs", "launcher", "model", "parallel", "training"):
        shutil.copytree(proofs.ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "training" / "agree.py").open("a") as file:
        file.write(
            "\n\n_sum_over = sum_over\n\n\ndef sum_over(*args, **kwargs):\n    return _sum_over(*args, **kwargs) * 2\n"
        )


@pytest.mark.parametrize(
    "start",
    [pytest.param(TRAIN, id="by itself"), pytest.param(TORCHRUN, id="by torchrun", marks=pytest.mark.full)],
)
def test_a_failed_proof_starts_no_run(start: list[str], folder: Path, tmp_path: Path) -> None:
    break_program(tmp_path)
    shutil.copy(folder / "text.txt", tmp_path)
    done = train(tmp_path, start, "proofs=kept")
    assert done.returncode == 1
    assert re.fullmatch(rf"{LAYOUT} has no proof yet: proving it \.\.\. FAILED after .* s\n", done.stdout)
    report = done.stderr[done.stderr.index("shoestring: ") :].splitlines()
    assert report[0] == f"shoestring: {LAYOUT} does not give the plain model's numbers; no run was started"
    assert report[1] == "spread" and any(line.startswith("FAILED  gradient norm ") for line in report)
    assert not any(line.startswith("passed") for line in report)
    assert "docs/proof.md says what each row is; verify=skip trains without a proof" in report
    assert not list((tmp_path / "runs").glob("*")) and not list((tmp_path / "kept").glob("*"))


def test_one_process_needs_no_proof(tmp_path: Path) -> None:
    words = [word for word in WORDS if not word.startswith("parallel.")]
    assert ask(*words, f"proofs={tmp_path}", "verify=require") is None
    assert not list(tmp_path.iterdir())


def test_a_proof_that_fails_now_is_forgotten(tmp_path: Path) -> None:
    words = (*WORDS, "parallel.dp=2", f"proofs={tmp_path}")
    config, _ = Composer().compose(words)
    shrunk = shrink(config, check_layout(config, None))
    good = {name: Verdict((Row("loss", 0.0, 1e-12, "step 0", 2),), "") for name in shrunk.cases}
    key = proofs.identify(shrunk.cases)
    said, proof = gate.settle(shrunk, key, good, config)
    assert proof == find_only(tmp_path) and proof.hash[:12] in said
    for bad in (Verdict((Row("loss", 1.0, 1e-12, "step 0", 2),), ""), Verdict((), "a rank died")):
        gate.settle(shrunk, key, good, config)
        assert gate.settle(shrunk, key, good | {"spread": bad}, config) == ("", None)
        assert not list(tmp_path.iterdir())
    said, proof = gate.settle(shrunk, "0" * 64, good, config)
    assert proof is not None and said == "not recorded: the sources changed meanwhile"
    assert not list(tmp_path.iterdir())
