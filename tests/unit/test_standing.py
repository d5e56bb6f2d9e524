"""How a run stands by its files, what of its logs is new, and whose a process is: small files, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher import cancel, cli
from launcher.compose import Composer
from launcher.follow import Log, clean
from launcher.slurm import jobs
from launcher.slurm.queue import Job
from launcher.standing import TAIL, forecast, read_beats, read_progress, read_steps, stand
from launcher.status import judge
from training.health.beat import Beat, Ending, locate, name_process, write

END = {"kind": "end", "ending": "finished"}


def step(number: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss": 5.0 - number, "seconds": 2.0, "cursor": 8 * (number + 1), **fields}


def record(run: Path, *rows: dict[str, Any], rest: str = "") -> Path:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows) + rest)
    return run


def beat(run: Path, rank: int, age: float, process: int = 1) -> None:
    now = time.time_ns() - int(age * 1e9)
    write(locate(run, rank, "heartbeat.json"), Beat(rank, "n1", process, now, "step 3 > 0F1", now, False, True, 0.5))


def test_progress_is_what_the_last_lines_say(tmp_path: Path) -> None:
    rows = [{"kind": "start"}, *map(step, range(500)), {"kind": "eval", "step": 500, "loss": 2.5}]
    run = record(tmp_path, *rows, {"kind": "checkpoint", "step": 480, "bytes": 1}, rest='{"kind": "step", "st')
    assert (run / "metrics.jsonl").stat().st_size > 30_000
    progress = read_progress(run)
    assert (progress.step, progress.loss, progress.seconds, progress.cursor) == (500, -494.0, 2.0, 4000)
    assert (progress.held_out, progress.checkpoint, progress.ending) == ((500, 2.5), 480, None)
    config = Composer().compose(("run.steps=600",))[0]
    assert forecast(config, progress) == 200.0


def test_a_record_longer_than_what_is_read(tmp_path: Path) -> None:
    progress = read_progress(record(tmp_path, *(step(number, pad="x" * 900) for number in range(200)), END))
    assert (progress.step, progress.ending) == (200, "finished")


def test_a_step_with_the_loads_of_many_experts(tmp_path: Path) -> None:
    """Those are longer than what is read of a record; the step stands behind them."""
    load = {"kind": "load", "step": 1, "load": [[10**6] * 256] * 58}
    progress = read_progress(record(tmp_path, step(0), load, step(1)))
    assert len(json.dumps(load)) > TAIL and (progress.step, progress.loss) == (2, 4.0)


@pytest.mark.parametrize("rest", ["", "\n\n", "[1]\n", "nonsense\n", '{"kind": "step"'])
def test_a_record_with_nothing_in_it(rest: str, tmp_path: Path) -> None:
    progress = read_progress(record(tmp_path, rest=rest))
    assert (progress.step, progress.loss, progress.ending) == (0, None, None)


def test_a_word_on_a_run(tmp_path: Path) -> None:
    run = record(tmp_path / "run")
    words = [stand(run, read_progress(run), read_beats(run))]
    beat(run, 0, 1)
    words.append(stand(run, read_progress(run), read_beats(run)))
    record(run, step(0))
    beat(run, 0, 3600)
    words.append(stand(run, read_progress(run), read_beats(run)))
    write(locate(run, 0, "record.json"), Ending(0, "n1", 1, "step 1", "ValueError: no", ""))
    words.append(stand(run, read_progress(run), read_beats(run)))
    (run / "state.json").write_text('{"state": "requeued"}')
    words.append(stand(run, read_progress(run), read_beats(run)))
    beat(run, 0, 1)
    (run / "state.json").write_text('{"state": "interrupted"}')
    words.append(stand(run, read_progress(run), read_beats(run)))
    record(run, step(0), END)
    words.append(stand(run, read_progress(run), read_beats(run)))
    assert words == ["not begun", "running", "silent", "failed", "requeued", "interrupted", "finished"]


def job(state: str) -> Job:
    return Job("7", state, "0:01", "0:59", "N/A", "n1", "1", "(null)", "None")


def test_what_slurm_says_counts_where_the_run_is_not_over() -> None:
    assert judge("finished", [job("RUNNING")]) == "finished"
    assert judge("interrupted", [job("COMPLETED")]) == judge("interrupted", [job("COMPLETING")]) == "interrupted"
    assert judge("interrupted", [job("COMPLETED"), job("PENDING")]) == "waiting", "it goes on"
    assert judge("failed", [job("RUNNING")]) == "running"
    assert judge("silent", [job("PENDING")]) == "waiting"
    assert judge("requeued", [job("RUNNING"), job("PENDING")]) == "running", "the second of a chain waits"
    assert judge("running", [job("TIMEOUT")]) == "out of time"
    assert judge("not begun", []) == "not begun"


def test_jobs_of_a_run_are_kept(tmp_path: Path) -> None:
    jobs.keep(tmp_path, "7", ("shoestring", "submit"))
    with (tmp_path / "jobs.jsonl").open("a") as file:
        file.write('{"job": "8"}\n{"jo')
    jobs.keep(tmp_path, "9_1", ())
    assert [each.job for each in jobs.read(tmp_path)] == ["7"] and jobs.read(tmp_path / "nowhere") == []


def test_steps_are_found_in_the_text(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(Composer().compose(("run.steps=77", "profile.steps=3"))[1])
    assert read_steps(tmp_path) == "77" and read_steps(tmp_path / "nowhere") == "?"


def test_a_log_is_read_from_where_it_was_left(tmp_path: Path) -> None:
    log = Log(path := tmp_path / "stdout.log", "rank 0 |")
    path.write_text("1\n2\n3\npart")
    log.skip(2)
    assert list(log.read()) == ["rank 0 | 2", "rank 0 | 3"]
    with path.open("a") as file:
        file.write("ly\n\x1b[2K1/9\r2/9\n")
    assert list(log.read()) == ["rank 0 | partly", "rank 0 | 2/9"] and list(log.read()) == []
    path.rename(tmp_path / "before")
    assert list(log.read()) == []
    path.write_text(f"{'anew' * 20}\nend")
    assert list(log.read(last=True)) == [f"rank 0 | {'anew' * 20}", "rank 0 | end"]


def test_what_a_terminal_would_show() -> None:
    assert clean("\x1b[31mred\x1b[0m\r") == "red" and clean("1/9\r\x1b[2K9/9") == "9/9"


@pytest.fixture
def process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Somebody who has a file of a run open."""
    (tmp_path / "run").mkdir()
    code = "import sys, time; f = open('run/metrics.jsonl', 'w'); print('there', flush=True); time.sleep(60)"
    started = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "there\n"
    with started:
        yield started
        started.kill()


def test_whose_a_process_is(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    assert cancel.is_of(process.pid, tmp_path / "run") and not cancel.is_of(process.pid, tmp_path / "other")
    assert not cancel.is_of(os.getpid(), tmp_path / "run")
    here = name_process()[0]
    told = {"state": "running", "node": here, "process": os.getpid()}
    (tmp_path / "run" / "state.json").write_text(json.dumps(told))
    assert cancel.find_process(tmp_path / "run") is None, "a number that is another's by now"
    (tmp_path / "run" / "state.json").write_text(json.dumps(told | {"process": process.pid}))
    assert cancel.find_process(tmp_path / "run") == process.pid
    (tmp_path / "run" / "state.json").write_text(json.dumps(told | {"process": process.pid, "node": "elsewhere"}))
    assert cancel.find_process(tmp_path / "run") is None


def test_a_process_is_told_as_it_listens(tmp_path: Path, process: subprocess.Popen[str]) -> None:
    assert cancel.choose_signal(process.pid) is signal.SIGINT
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print('there', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as deaf:
        assert deaf.stdout is not None and deaf.stdout.readline()
        assert cancel.choose_signal(deaf.pid) is signal.SIGTERM
        deaf.kill()


def test_the_verbs_say_that_there_is_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("status", "logs", "cancel"):
        assert cli.main([verb, "nowhere", f"folder={tmp_path}"]) == 2
        assert "run=nowhere must be a run's folder" in capsys.readouterr().err
    assert cli.main(["runs", f"folder={tmp_path}"]) == 2
    assert "has no run in it" in capsys.readouterr().err
