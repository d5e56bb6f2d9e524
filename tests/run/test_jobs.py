"""What a user types about jobs on a machine without Slurm, and about a run of this machine, as it trains."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import cli, folder

ROOT = Path(__file__).parents[2]
LARGE = (
    "run=deepseek_v3",
    "cluster=slurm",
    "cluster.nodes=1024",
    "parallel.pp=16",
    "parallel.ep=64",
    "run.ramp.start=null",
)
WORDS = ("run=tiny", "cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=2", "run.micro_batch=2")


def type_(at: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    told = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "launcher.cli", *words]
    return subprocess.run(command, cwd=at, env=told, capture_output=True, text=True, timeout=120)


@pytest.fixture
def bare(tmp_path: Path) -> str:
    """A PATH without Slurm."""
    (tmp_path / "bin").mkdir()
    return str(tmp_path / "bin")


def test_a_dry_run_without_slurm_prints_the_script(tmp_path: Path, bare: str) -> None:
    done = type_(tmp_path, "submit", *LARGE, "run.id=large", "--dry-run", PATH=bare)
    assert (done.returncode, done.stderr) == (0, "")
    assert "#SBATCH --nodes=1024\n" in done.stdout and "#SBATCH --ntasks-per-node=8\n" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("# sbatch is not on this machine")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_dry_run_of_thousand_nodes_loads_no_torch(tmp_path: Path, bare: str) -> None:
    code = f"import sys; from launcher import cli; code = cli.main({['submit', *LARGE, '--dry-run']})"
    code += "; print(*sys.modules, file=sys.stderr); sys.exit(code)"
    told = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": bare}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=told, capture_output=True, text=True)
    assert done.returncode == 0 and "launcher.submit" in done.stderr.split()
    assert not {"torch", "transformers", "deepspeed", "mpi4py", "triton"} & set(done.stderr.split())


def test_without_slurm_nothing_is_submitted_or_left(tmp_path: Path, bare: str) -> None:
    done = type_(tmp_path, "submit", *WORDS, PATH=bare)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("shoestring: no job was submitted: sbatch is not on this machine")
    done = type_(tmp_path, "submit", "run=tiny", PATH=bare)
    assert done.stderr.startswith("shoestring: cluster=local must be cluster=slurm")
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    words = (*WORDS, "data.corpus=[here,there]", "data.tokenizer=gone", "init_from=gone", "run.folder=/dev/null")
    for verb in ("validate", "submit"):
        done = type_(tmp_path, verb, *words)
        assert (done.returncode, done.stdout) == (2, "")
        keys = [line.partition("=")[0] for line in done.stderr.splitlines()]
        wanted = ["data.corpus", "data.corpus", "data.tokenizer", "run.folder", "init_from"]
        assert keys == [f"shoestring: {key}" for key in wanted]
    assert not list(tmp_path.iterdir())


def test_a_verdict_before_anything_starts(tmp_path: Path) -> None:
    done = type_(tmp_path, "validate", *LARGE, "cluster.device_gigabytes=80", "cluster.gres=gpu:8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "deepseek_v3: 8192 ranks on 1024 nodes of 8 devices: pp=16 dp=512" in done.stdout
    assert "  memory of a rank: " in done.stdout and "activations come on top" in done.stdout
    assert "note: no devices are asked for" not in done.stdout and "note: no time limit" in done.stdout
    assert done.stdout.splitlines()[-1] == "nothing is wrong that can be told without starting"
    done = type_(tmp_path, "validate", *LARGE, "cluster.device_gigabytes=8")
    assert done.returncode == 2 and "cluster.device_gigabytes=8.0 must be at least" in done.stderr


@pytest.mark.parametrize(
    ("variables", "name"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "4 processes that torchrun"),
        (
            {f"OMPI_COMM_WORLD_{name}": value for name, value in
             {"RANK": "0", "SIZE": "3", "LOCAL_RANK": "0", "LOCAL_SIZE": "3"}.items()},
            "3 processes that mpirun",
        ),
        (
            {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
             "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1"},
            "2 processes that srun",
        ),
    ],
    ids=["torchrun", "mpirun", "srun"],
)  # fmt: skip
def test_a_world_does_not_sweep_or_submit(
    variables: dict[str, str], name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for what, words in {"--multirun": ["params", "-m", "run.seed=1,2"], "submit": ["submit", *WORDS]}.items():
        assert cli.main(words) == 2
        assert f"shoestring: {what} must be typed once, and this is one of {name}" in capsys.readouterr().err


def test_an_array_has_the_same_nodes_for_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", *WORDS, "cluster.timeout_min=5,6", "-m", "--dry-run"]) == 2
    assert "--multirun must leave cluster.* as it is" in capsys.readouterr().err


def test_only_submit_has_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--dry-run"]) == 2
    assert "--dry-run is not a flag of train" in capsys.readouterr().err


def test_a_script_of_ones_own_finds_its_run(tmp_path: Path) -> None:
    words = ("enroll", *WORDS, "run.id=mine", "verify=skip")
    first = type_(tmp_path, *words, SLURM_JOB_ID="11")
    assert (first.returncode, first.stdout) == (0, f"{tmp_path / 'runs' / 'mine'}\n")
    again = type_(tmp_path, *words, "run.steps=9", SLURM_JOB_ID="11", SLURM_RESTART_COUNT="1")
    assert again.stdout == first.stdout and not (tmp_path / "runs" / "mine" / "before").exists()
    assert type_(tmp_path, *words, "run.steps=9", SLURM_JOB_ID="12").stdout == first.stdout
    run = tmp_path / "runs" / "mine"
    assert json.loads((run / "proof.json").read_text()) == {"verify": "skip"}
    assert folder.load_config(run).run.steps == 9 and (run / "before" / "1" / "config.yaml").exists()
    assert [json.loads(line)["job"] for line in (run / "jobs.jsonl").read_text().splitlines()] == ["11", "12"]
    done = type_(tmp_path, "enroll", *WORDS)
    assert done.returncode == 2 and "run.id=null must have a value" in done.stderr


def test_a_run_of_this_machine_is_watched_and_ended(tmp_path: Path) -> None:
    """Two ranks that the program starts; nobody here knows of Slurm."""
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 500)
    words = ["train", "run=tiny", "run.id=one", "run.steps=100000", "parallel.dp=2", "verify=skip", "run.compile=off"]
    words += ["run.threads=1", "data.corpus=[text.txt]", "data.sequence_length=32", "run.micro_batch=1"]
    told = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher.cli", *words, "run.global_batch=2", "run.eval_every=0"]
    with subprocess.Popen(command, cwd=tmp_path, env=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as train:
        try:
            record = tmp_path / "runs" / "one" / "metrics.jsonl"
            deadline = time.monotonic() + 90
            while not (record.exists() and '"kind": "step"' in record.read_text()) and time.monotonic() < deadline:
                time.sleep(0.1)
            said = type_(tmp_path, "status", "one")
            assert said.returncode == 0 and said.stdout.startswith("runs/one: running\nsteps    ")
            assert " of 100000 (0%)  loss " in said.stdout and "ranks    2 of 2 give signs of life" in said.stdout
            assert "one  running  " in type_(tmp_path, "runs").stdout
            follower = subprocess.Popen(
                [sys.executable, "-m", "launcher.cli", "logs", "one", "follow=true"],
                cwd=tmp_path, env=told, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert follower.stdout is not None and follower.stdout.readline().startswith("rank 0 | ")
            assert "SIGINT: it saves and ends" in type_(tmp_path, "cancel", "one").stdout
            assert train.wait(60) == 130
            with follower:  # not communicate, which knows nothing of what readline has read ahead
                rest = follower.stdout.read()
            assert follower.returncode == 0
            assert "rank 0 | interrupted after " in rest and "rank 1 | step 1/100000  loss" in rest
        finally:
            train.kill()
    said = type_(tmp_path, "status", "one")
    assert said.stdout.startswith("runs/one: interrupted\n") and "kept     a checkpoint after step" in said.stdout
    assert "rank 1 | step" in type_(tmp_path, "logs", "one", "rank=1", "lines=3").stdout
    assert "rank=2 must be one of 0, 1" in type_(tmp_path, "logs", "one", "rank=2").stderr
    assert "has nothing to end" in type_(tmp_path, "cancel", "one").stderr


@pytest.mark.parametrize("verb", ["train", "preflight"])
def test_what_starts_ranks_here_starts_none_of_a_cluster(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([verb, "cluster=slurm", "run.micro_batch=1"]) == 2
    said = "shoestring: cluster=slurm must be left away here: shoestring submit hands a run to Slurm\n"
    assert capsys.readouterr().err == said
