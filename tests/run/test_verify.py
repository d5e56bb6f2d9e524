"""``shoestring verify`` as a user types it."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from small_models import make_config
from small_runs import make_run

from launcher import cli, proofs, trial
from model.config import Recompute
from parallel.config import EngineName, ParallelConfig, PipelineConfig, ScheduleName
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.report import BEHIND_ENGINE, ROUNDED
from training.proof.shrink import shrink
from training.support import DEEPSPEED

ROOT = Path(__file__).parents[2]
ADAM = OptimizerConfig(lr=1e-3, clip=0.3)


@pytest.mark.parametrize("engine", ["native", pytest.param("zero1", marks=pytest.mark.full)])
def test_a_layout_is_proved_and_recorded(engine: str, tmp_path: Path) -> None:
    layout = ["parallel.dp=2", "parallel.ep=2", f"parallel.engine={engine}"]
    command = [str(ROOT / ".venv/bin/shoestring"), "verify", "run=tiny", *layout, f"proofs={tmp_path / 'kept'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    assert lines[0] == f"dp=2 tp=1 ep=2, engine {engine}, spread" and "FAILED" not in done.stdout
    assert sum(line.startswith("passed  gradients ") for line in lines) == 2
    (path,) = (tmp_path / "kept").iterdir()
    said = ["the numbers are those of the plain model", f"recorded as {path.stem[:12]} in {path.parent}"]
    proof = proofs.find(path.parent, path.stem)
    assert lines[-2:] == said and proof is not None and len(proof.cases) == 2
    assert (proof.engine, proof.topology["ep"], "deepspeed" in proof.versions) == (engine, 2, engine == "zero1")


def test_a_pipeline_is_proved_and_recorded(tmp_path: Path) -> None:
    layout = ["parallel.pp=2", "parallel.pipeline.schedule=zb_v", "run.micro_batch=1"]
    command = [str(ROOT / ".venv/bin/shoestring"), "verify", "run=tiny", *layout, f"proofs={tmp_path / 'kept'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    assert done.stdout.startswith("pp=2 dp=1 tp=1 ep=1, zb_v, engine native, spread\n") and "FAILED" not in done.stdout
    (path,) = (tmp_path / "kept").iterdir()
    proof = proofs.find(path.parent, path.stem)
    assert proof is not None and proof.topology["pp"] == 2 and len(proof.cases) == 2


def test_another_schedule_is_another_class(tmp_path: Path) -> None:
    """So is another content of a file of the same name."""
    config = make_run(tmp_path, model=make_config(num_layers=6, vocab_size=264), micro_batch=2)
    (path := tmp_path / "mine.txt").write_text("0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n" + "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3")
    pipelines = [PipelineConfig(schedule=name) for name in ScheduleName if name != "dualpipe"]
    found = []
    for pipeline in [*pipelines, PipelineConfig(file=str(path))]:
        config.parallel = ParallelConfig(pp=2, pipeline=pipeline)
        found.append(proofs.identify(cases := shrink(config, Topology(pp=2)).cases))
    path.write_text("0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3\n" + "1F0 1B0 1F1 1B1 1F2 1B2 1F3 1B3")
    assert len({*found, proofs.identify(cases)}) == len(found) + 1


FOLDED = Case(Topology(dp=2, tp=2, ep=4), make_config(num_layers=2, moe={"experts": 8, "groups": 4}), ADAM)
# The embedding is of the first stage, of the last for its head, and of MTP's.
PIPED = Case(
    Topology(pp=2, dp=2, ep=2),
    make_config(num_layers=5, mtp=1, tied=True),
    ADAM,
    pipeline=PipelineConfig(schedule="interleaved_1f1b", virtual=2),
    accumulation=4,
)


BESIDE = Case(
    Topology(dp=2), make_config(num_layers=2, mtp=1, moe={"score": "softmax", "shared_experts": 1}), ADAM, micro_batch=2
)
THREE = [
    replace(
        BESIDE,
        topology=Topology(dp=3),
        model=make_config(mtp=depth, tied=tied, moe=moe, recompute=recompute),
        crowded=bool(depth),
        optimizer=how,
    )
    for depth, tied, moe, recompute, how in (
        (0, True, {"shared_experts": 0}, Recompute.none, ADAM),
        (1, False, {"score": "softmax"}, Recompute.selective, replace(ADAM, clip=1e3, weight_decay=0.3)),
        (2, True, {"aux_alpha": 0.0}, Recompute.full, replace(ADAM, bucket_bytes=1024)),
    )
]


@pytest.mark.parametrize(
    ("layouts", "engines"),
    [
        pytest.param([FOLDED], DEEPSPEED[:2], marks=pytest.mark.full),
        pytest.param([PIPED], DEEPSPEED[:2], marks=pytest.mark.full),
        pytest.param([BESIDE], DEEPSPEED[2:], marks=pytest.mark.full),
        pytest.param(THREE, DEEPSPEED[2:], marks=pytest.mark.full),
    ],
    ids=["folded", "piped", "beside", "three"],
)
def test_engines_of_deepspeed_are_held_to_rounding_and_what_comes_before_them_is_not(
    layouts: list[Case], engines: tuple[EngineName, ...]
) -> None:
    """Half of the cases crowded. What is rounded, is: these engines do take the steps."""
    cases = {
        f"{engine} {number}": replace(layout, engine=engine, crowded=layout.crowded or engine is EngineName.zero2)
        for engine in engines
        for number, layout in enumerate(layouts)
    }
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
        (["parallel.pp=2", "parallel.pipeline.file=nowhere.txt"], "parallel.pipeline.file=nowhere.txt cannot be read"),
        (["parallel.pp=2", "parallel.pipeline.schedule=zb_v", "model.num_layers=3"], "number of pipeline stages, 4"),
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
    assert "rank 0 of 2 that torchrun started: shoestring verify starts ranks of its own" in capsys.readouterr().err


def test_a_rank_that_fails_fails_the_proof() -> None:
    case = Case(Topology(tp=2), make_config(num_layers=1), ADAM, steps=1)
    # In the second case two ranks cannot hold equal shards of a sequence.
    verdicts = trial.start({"good": case, "bad": replace(case, length=7), "never run": case})
    assert verdicts["good"].passed
    assert not verdicts["bad"].passed and "Traceback" in str(verdicts["bad"])
    assert not verdicts["never run"].passed and str(verdicts["never run"]) == "not proved: a rank had failed"
