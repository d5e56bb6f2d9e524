"""``shoestring train`` on two ranks, as it is typed: started by itself and by torchrun, to the end and to bad ends.

Without a proof: tests/run/test_gate.py is about that."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_train import SMALL, rows
from torch.distributed import TCPStore

from training.determinism import count_cores

TRAIN = [sys.executable, "-m", "launcher.train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "launcher.train"]
WORDS = ["data.corpus=[text.txt]", *SMALL, "precision=fp32", "verify=skip", "run.restarts=0"]
LONG = ["run.steps=100000", "run.eval_every=0"]
TWO = ["parallel.dp=2", "parallel.ep=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, and in it a run of one process, ``runs/one``."""
    folder = tmp_path_factory.mktemp("ranks")
    lines = (f"line {i}: the {i * i} quick brown foxes jump over {i % 7} lazy dogs — naïvely\n" for i in range(900))
    (folder / "text.txt").write_text("".join(lines))
    train(folder, TRAIN, "run.id=one")
    return folder


def train(folder: Path, start: list[str], *overrides: str, code: int = 0, **environment: str) -> tuple[str, str]:
    """Runs the command in ``folder``; returns what it printed."""
    done = subprocess.run(
        [*start, *WORDS, *overrides],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "3", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout, done.stderr


@contextmanager
def running(folder: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen[str], dict[int, int]]]:
    """The command on two ranks, that has taken a step, and the process of each rank: both have ended behind it."""
    command = [*TRAIN, *WORDS, *LONG, *TWO, *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = ""
    while "step 1/" not in said:
        line = process.stdout.readline()
        assert line, said + process.communicate()[1]
        said += line
    ranks = {}
    for pid in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        ranks |= {int(value.removeprefix("RANK=")): pid for value in variables if value.startswith("RANK=")}
    try:
        assert sorted(ranks) == [0, 1]
        yield process, ranks
        deadline = time.monotonic() + 20
        while any(map(lives, ranks.values())):
            assert time.monotonic() < deadline, "a rank lives on"
            time.sleep(0.05)
    finally:
        process.kill()
        for pid in filter(lives, ranks.values()):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def addresses(pid: int) -> set[str]:
    """The addresses, in hexadecimal, at which a process waits for connections."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(link).removeprefix("socket:[").rstrip("]"))
        except FileNotFoundError:
            continue
    table = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return {line[1].partition(":")[0] for line in table if line[3] == "0A" and line[9] in sockets}


def check_same_numbers(folder: Path, run: str) -> None:
    one, two = (rows(folder / "runs" / name, "step") for name in ("one", run))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], abs=1e-3)
    assert len(two) == 8 and two[-1]["tokens"] == one[-1]["tokens"]
    one, two = (rows(folder / "runs" / name, "eval") for name in ("one", run))
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], abs=1e-3)
    assert rows(folder / "runs" / run, "end")[0]["ending"] == "finished"


def test_a_run_starts_its_own_ranks(folder: Path) -> None:
    out, err = train(folder, TRAIN, *TWO, "run.id=own", "run.threads=null")
    check_same_numbers(folder, "own")
    run = folder / "runs" / "own"
    (start,) = rows(run, "start")
    assert (start["ranks"], start["threads"]) == (2, max(1, count_cores() // 2)), "whatever OMP_NUM_THREADS says"
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "command.txt", "weights", "sample.txt", "logs"}
    logs = {path.relative_to(run / "logs").as_posix(): path.read_text() for path in run.glob("logs/*/*")}
    assert set(logs) == {f"rank{n}/{name}" for n in (0, 1) for name in ("stdout.log", "stderr.log", "heartbeat.json")}
    skipped = "verify=skip: dp=2 tp=1 ep=2, engine native starts without a proof\n"
    assert json.loads((run / "proof.json").read_text()) == {"verify": "skip"}
    assert out == skipped + "run runs/own\n" + logs["rank0/stdout.log"] and "finished after 8 of 8 steps" in out
    assert err == ""
    last = re.findall(r"^step 8/8  loss \S+", logs["rank0/stdout.log"], re.MULTILINE)
    assert re.findall(r"^step 8/8  loss \S+", logs["rank1/stdout.log"], re.MULTILINE) == last != []


def test_torchrun_starts_the_same_ranks(folder: Path) -> None:
    """``dp`` is what torchrun's world leaves."""
    out, _ = train(folder, TORCHRUN, "parallel.ep=2", "run.id=torchrun", "run.threads=null")
    check_same_numbers(folder, "torchrun")
    (start,) = rows(folder / "runs" / "torchrun", "start")
    assert (start["ranks"], start["threads"]) == (2, max(1, count_cores() // 2))
    for once in ("verify=skip: ", "run runs/torchrun", "finished after 8 of 8 steps", "step 8/8"):
        assert out.count(once) == 1
    assert "step 8/8  loss " in (folder / "runs" / "torchrun" / "logs" / "rank1" / "stdout.log").read_text()


def test_ranks_with_different_configurations_do_not_start(folder: Path) -> None:
    """Started by hand, so that nobody ends one rank when the other has ended: each finds out by itself."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = []
    for rank in (0, 1):
        environment = {**os.environ, **meeting, "RANK": str(rank), "WORLD_SIZE": "2"}
        command = [*TRAIN, *WORDS, "run.id=apart", f"optimizer.lr=0.00{rank + 1}", f"run.seed={rank}"]
        ranks.append(subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True))
    said = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert "optimizer.lr=0.002 on rank 1, 0.001 on rank 0: start every rank with the same command" in said[0]
    assert said[1] == "" and not (folder / "runs" / "apart").exists()


def test_a_killed_rank_is_reported_and_ends_the_others(folder: Path) -> None:
    with running(folder, "run.id=killed") as (process, ranks):
        for pid in (process.pid, *ranks.values()):
            assert addresses(pid) <= {"0100007F", "0000000000000000FFFF00000100007F"}, "only this machine may connect"
        assert addresses(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.match(r"shoestring: rank 1 was ended by SIGKILL in \w+", err.splitlines()[0])
    assert "then rank 0 lost its connection" in err or "then rank 0 was ended by SIGTERM" in err
    assert "every rank's output is in runs/killed/logs" in err


def test_an_exception_in_a_rank_is_reported_first(folder: Path) -> None:
    """The second rank runs a program that breaks in its third step."""
    broken = folder / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import training.steps\n"
        "    run_step = training.steps.run_step\n"
        "    def break_at_two(setup, step, *rest):\n"
        "        print('about to take step', step)\n"
        "        assert step < 2, 'broken on purpose'\n"
        "        return run_step(setup, step, *rest)\n"
        "    training.steps.run_step = break_at_two\n"
    )
    out, err = train(folder, TRAIN, *TWO, "run.id=broken", code=1, PYTHONPATH=str(broken))
    first, *rest = err.splitlines()
    assert first == "shoestring: rank 1 raised AssertionError: broken on purpose in sitecustomize.break_at_two"
    record = json.loads((folder / "runs" / "broken" / "logs" / "rank1" / "record.json").read_text())
    assert record["rank"] == 1 and record["error"] == "AssertionError: broken on purpose"
    assert abs(record["time"] / 1e9 - time.time()) < 120 and "break_at_two" in record["stack"]
    assert rest[:2] == ["--- the end of runs/broken/logs/rank1/stdout.log", "about to take step 0"]
    assert err.count("Traceback") == 1 and err.index("about to take step 2") < err.rindex("break_at_two")
    assert "Traceback" not in out
    assert "broken on purpose" in (folder / "runs" / "broken" / "logs" / "rank1" / "stderr.log").read_text()


def test_a_mistake_that_ranks_find_is_printed_once(folder: Path) -> None:
    _, err = train(folder, TRAIN, *TWO, "run.id=mistaken", "optimizer.no_decay=['*nrom*']", code=2)
    (said,) = err.splitlines()
    assert said.startswith("shoestring: optimizer.no_decay: the pattern '*nrom*' matches no parameter")
    assert not (folder / "runs" / "mistaken").exists(), "the id is free for the next try"


@pytest.mark.full
def test_under_torchrun_rank_0_alone_prints_a_mistake(folder: Path) -> None:
    _, err = train(folder, TORCHRUN, "run.id=theirs", "optimizer.no_decay=['*nrom*']", code=1)
    assert err.count("shoestring: optimizer.no_decay: the pattern '*nrom*' matches no parameter") == 1
    assert not (folder / "runs" / "theirs" / "config.yaml").exists()


def test_ctrl_c_saves_what_the_ranks_have(folder: Path) -> None:
    with running(folder, "run.id=stopped") as (process, _):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (130, "")
    run = folder / "runs" / "stopped"
    taken = len(rows(run, "step"))
    assert (
        f"interrupted after {taken} of 100000 steps" in out
        and f"weights saved in {Path('runs/stopped/weights')}" in out
    )
    assert (run / "weights" / "manifest.json").exists()


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.full), signal.SIGKILL])
def test_ranks_end_with_the_process_that_started_them(folder: Path, number: signal.Signals) -> None:
    with running(folder, f"run.id={number.name}") as (process, _):
        process.send_signal(number)
        process.wait(timeout=120)
    assert process.returncode == (128 + number if number is signal.SIGTERM else -number)
