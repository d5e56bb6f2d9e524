"""Batch scripts: every text in them arrives as it was meant, in bash and in sbatch, both real, hostile or not."""

import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from configs.cluster import ClusterConfig, Launcher, Scheduler, check_text
from launcher.slurm import script

TEMPLATE = script.TEMPLATE.read_text()
# A program in place of the interpreter: where it was, and its words, each ended by a NUL.
RECORDER = '#!/bin/sh\nprintf "%s\\0" "$PWD" "$0" "$@" >"$RECORD"\n'
PIECES = [
    "$(touch gone)", "`touch gone`", "; touch gone;", "|| touch gone", "&& touch gone", "> gone", "${PATH}", "$$", "!!",
    "'", '"', "\\", "\\'", '\\"', "\n", "\r", "\t", " ", "  ", "#", " # ", "*", "?", "~", "%j", "%%", "%", "{a,b}",
    "--", "-", "=", "# >>> run\n", "# <<<\n", "#SBATCH --wrap=x", "\\1", "\\g<0>", "é", "語", "\u00a0", "\u2028", "a",
    "b9", "\x1b[31m", "$'\\n'", "<<EOF\n", "[x]", "(", ")", "@", "packjob", "hetjob",
]  # fmt: skip


def cluster(**keys: object) -> ClusterConfig:
    return ClusterConfig(scheduler=Scheduler.slurm, **keys)  # type: ignore[arg-type]


def draw(source: random.Random) -> str:
    """A hostile text that can be the name of a file."""
    text = "".join(source.choice(PIECES) for _ in range(source.randint(1, 6)))
    return text.replace("/", "_").strip(".")[:80] or "x"


def render(folder: Path, python: Path, here: Path, *, setup: tuple[str, ...] = (), array: bool = False) -> str:
    options = script.list_options(cluster(nodes=2), "name", "out")
    blocks = {
        "about": ("# a test",),
        "options": script.write_options(options),
        "setup": setup,
        "run": script.write_run(folder, (str(python), "-P"), here, array),
    }
    return script.render(blocks, TEMPLATE)


def start(text: str, at: Path, **environment: str) -> tuple[list[str], str]:
    """Runs a script in bash -> what the recorder saw, and what was printed."""
    at.mkdir(exist_ok=True)
    (at / "job.sbatch").write_text(text)
    told = {"PATH": "/usr/bin:/bin", "RECORD": str(at / "record"), **environment}
    done = subprocess.run(["bash", "job.sbatch"], cwd=at, env=told, capture_output=True, text=True, timeout=20)
    seen = (at / "record").read_bytes().decode().split("\0")[:-1] if (at / "record").exists() else []
    return seen, done.stdout + done.stderr


@pytest.mark.parametrize("seed", range(40))
def test_hostile_paths_arrive_letter_by_letter(seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)  # noqa: S311
    here, folder = tmp_path / f"h{draw(source)}", tmp_path / f"r{draw(source)}"
    python = tmp_path / f"p{draw(source)}"
    here.mkdir()
    python.write_text(RECORDER)
    python.chmod(0o755)
    at = tmp_path / "spool"
    seen, printed = start(render(folder, python, here), at)
    assert (seen, printed) == ([str(here), str(python), "-P", "-m", "launcher.supervise", str(folder)], "")
    made = {path.name for path in [*tmp_path.rglob("*")]}
    assert made == {here.name, python.name, "spool", "job.sbatch", "record"}, "nothing else was written"


@pytest.mark.parametrize("seed", range(10))
def test_an_element_of_an_array_finds_its_run(seed: int, tmp_path: Path) -> None:
    source = random.Random(100 + seed)  # noqa: S311
    root, python = (tmp_path / f"{letter}{draw(source)}" for letter in "rp")
    run, array = root / "seed-7", root / "seeds-array"  # names of runs are plain: configs take no others
    run.mkdir(parents=True)
    array.mkdir()
    (array / "7").symlink_to(f"../{run.name}")
    python.write_text(RECORDER)
    python.chmod(0o755)
    seen, printed = start(render(array, python, tmp_path, array=True), tmp_path / "spool", SLURM_ARRAY_TASK_ID="7")
    assert (seen[-1:], printed) == ([str(run)], "")


def test_setup_runs_first_and_its_failure_ends_the_job(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    good = render(
        tmp_path / "run", python, tmp_path, setup=("export RECORD=$PWD/elsewhere; echo '# <<<'", "#SBATCH --x")
    )
    assert start(good, tmp_path / "good") == ([], "# <<<\n") and (tmp_path / "good" / "elsewhere").exists()
    bad = render(tmp_path / "run", python, tmp_path, setup=("false",))
    assert start(bad, tmp_path / "bad") == ([], "")


def test_a_folder_that_is_gone_ends_the_job(tmp_path: Path) -> None:
    seen, printed = start(render(tmp_path / "run", Path("/bin/true"), tmp_path / "gone"), tmp_path / "spool")
    assert seen == [] and "gone" in printed


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is missing: install slurm-client")
def test_slurm_reads_back_every_option(tmp_path: Path) -> None:
    """sbatch says what it finds in a script before it looks for a controller, which there is none of."""
    source = random.Random(0)  # noqa: S311
    values: list[str] = []
    while len(values) < 300:
        text = draw(source).strip()
        try:
            check_text("cluster.comment", text)
        except ValueError:
            assert not text.isprintable() or not text or text != text.strip()
            continue
        values.append(text)
    options: dict[str, str | None] = {f"comment{number}": value for number, value in enumerate(values)}
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\nAuthType=auth/none\nNodeName=n1\n")
    text = "\n".join(["#!/bin/bash", *script.write_options(options | {"requeue": None}), "", "true", ""])
    told = {"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["sbatch", "-vvv"], input=text, env=told, capture_output=True, text=True, timeout=20)
    found = re.findall(r'Found in script, argument "(.*)"$', done.stderr, re.MULTILINE)
    assert found == [*(f"--{name}={value}" for name, value in options.items()), "--requeue"]


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="sbatch is missing: install slurm-client")
def test_slurm_reads_the_script_that_is_used_by_hand(tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\nAuthType=auth/none\nNodeName=n1\n")
    told = {"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": "/usr/bin:/bin"}
    words = ["sbatch", "-vvv", str(script.TEMPLATE)]
    done = subprocess.run(words, env=told, capture_output=True, text=True, timeout=20)
    assert re.findall(r'Found in script, argument "(.*)"$', done.stderr, re.MULTILINE) == [
        "--nodes=2",
        "--ntasks-per-node=8",
        "--gres=gpu:8",
        "--time=24:00:00",
        "--job-name=mine",
        "--output=job-%j.out",
        "--signal=B:USR2@120",
        "--requeue",
        "--open-mode=append",
    ]
    assert len(re.findall(r"\(\d\)$|# \(\d\)", TEMPLATE, re.MULTILINE)) == 3
    subprocess.run(["bash", "-n", str(script.TEMPLATE)], check=True)


def test_options_of_a_job() -> None:
    keys = {"nodes": 4, "spares": 1, "cpus_per_task": 6, "mem": "0", "timeout_min": 90, "requeue": False}
    own = {"mail_type": "END", "exclusive": "True", "nice": "100"}
    config = cluster(**keys, gres="gpu:8", additional_parameters=own, array_parallelism=2)
    assert script.list_options(config, "mine", "/r/job-%j.out", 3) == {
        "job-name": "mine",
        "nodes": "5",
        "ntasks-per-node": "8",
        "cpus-per-task": "6",
        "gres": "gpu:8",
        "mem": "0",
        "time": "90",
        "array": "0-2%2",
        "output": "/r/job-%j.out",
        "signal": "B:USR2@120",
        "no-requeue": None,
        "no-kill": None,
        "mail-type": "END",
        "exclusive": None,
        "nice": "100",
    }


def test_torchrun_is_one_task_with_all_cores_of_a_node() -> None:
    options = script.list_options(cluster(launcher=Launcher.torchrun, cpus_per_task=6), "mine", "out")
    assert (options["ntasks-per-node"], options["cpus-per-task"]) == ("1", "48")


@pytest.mark.parametrize("name", ["a\\b", "a\nb", "a\x1bb"])
def test_a_path_that_slurm_cannot_write_to_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.folder: .* must be a path of printable characters"):
        script.write_pattern(Path("/r") / name, "job-%j.out")


def test_percent_signs_of_a_path_are_no_pattern() -> None:
    assert script.write_pattern(Path("/r/100%j"), "job-%j.out") == "/r/100%%j/job-%j.out"
