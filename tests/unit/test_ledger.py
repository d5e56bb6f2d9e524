"""Where time goes: parts that add up to the last nanosecond, over attempts that end well, by a fault, or by SIGKILL."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.health.beat import Beat, locate, write
from training.holder import Holder, find_holder, read_start
from training.ledger import PARTS, SECOND, Attempt, Ledger, describe, look, open_ledger, read, sum_parts
from training.metrics import Record


class Clock:
    """Goes on when it is told to."""

    def __init__(self, now: int) -> None:
        self.now = now * SECOND

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * SECOND)


def open_at(run: Path, clock: Clock, since: int, name: str = "job 7.0", kept: bool = True) -> Ledger:
    """Of two ranks, which cost 72 an hour together, by a process that was started just now."""
    return Ledger(run, kept, 2, 72.0, Holder(name, since * SECOND, clock.now), clock)


def spent(attempt: Attempt) -> dict[str, float]:
    """Seconds of the parts that have any."""
    assert sum(attempt.parts.values()) == attempt.end - attempt.begin and list(attempt.parts) == list(PARTS)
    return {part: value / SECOND for part, value in attempt.parts.items() if value}


def step(ledger: Ledger, clock: Clock, number: int, seconds: float, stall: float = 0.0) -> None:
    with ledger.during(ledger.stepping(number)):
        clock.wait(seconds / 2)
        with ledger.during("checkpoints"):
            clock.wait(stall)
        clock.wait(seconds / 2)
    ledger.take(number)


def test_time_is_spent_on_the_innermost_part(tmp_path: Path) -> None:
    clock = Clock(110)
    ledger = open_at(tmp_path, clock, since=100)
    clock.wait(5)
    ledger.switch("other")
    step(ledger, clock, 0, 2.0, stall=0.5)
    clock.wait(0.25)
    with pytest.raises(KeyError), ledger.during("evaluation"):
        clock.wait(3)
        raise KeyError
    ledger.switch("ending")
    clock.wait(1)
    ledger.close("finished")
    ledger.close("failed")
    (attempt,) = read(tmp_path)
    assert spent(attempt) == {
        "setup": 15.0,
        "useful": 2.0,
        "checkpoints": 0.5,
        "other": 0.25,
        "evaluation": 3.0,
        "ending": 1.0,
    }
    assert (attempt.ending, attempt.next, attempt.highest, attempt.begin) == ("finished", 1, 1, 100 * SECOND)
    assert not (tmp_path / "ledger.open.json").exists()
    assert ledger.count_cost() == pytest.approx(72 * 21.75 / 3600)


def test_steps_that_are_taken_again_are_known(tmp_path: Path) -> None:
    clock = Clock(0)
    ledger = open_at(tmp_path, clock, since=0)
    ledger.switch("other")
    for number in range(5):
        step(ledger, clock, number, 1.0)
    ledger.close("failed")
    clock.wait(3)  # until the ranks are there again
    again = open_at(tmp_path, clock, since=7)  # torchrun's ranks, started again, have written the configuration anew
    clock.wait(4)
    again.switch("other")
    for number in range(3, 7):
        step(again, clock, number, 1.0)
    again.close("finished")
    clock.wait(1000)
    later = open_at(tmp_path, clock, since=1010, name="job 9.0")  # the run goes on, on other devices
    clock.wait(2)
    later.close("finished")
    first, second, third = read(tmp_path)
    assert spent(first) == {"useful": 5.0}
    assert spent(second) == {"restarts": 7.0, "recomputed": 2.0, "useful": 2.0} and second.begin == first.end
    assert spent(third) == {"setup": 8.0} and (third.begin, third.attempt) == (1010 * SECOND, 3)


def test_a_killed_attempt_is_closed_where_it_last_lived(tmp_path: Path) -> None:
    """It had written down two steps of five, was in the sixth, and a heartbeat says until when."""
    clock = Clock(50)
    ledger = open_at(tmp_path, clock, since=50)
    clock.wait(10)
    ledger.switch("other")
    step(ledger, clock, 0, 0.5)
    step(ledger, clock, 1, 1.0)  # with it, both are written down
    with Record(tmp_path / "metrics.jsonl") as record:
        for number in range(5):
            step(ledger, clock, number, 0.1) if number > 1 else None
            record.write("step", step=number, seconds=0.1)
    os.utime(tmp_path / "metrics.jsonl", (61.8, 61.8))
    clock.wait(0.1)
    aside = tmp_path / "before/12"
    for place, at in ((aside, 63), (tmp_path / "before/2", 64), (tmp_path, 99)):  # the last one is of the next attempt
        write(locate(place, 1, "heartbeat.json"), Beat(1, "n", 1, at * SECOND, "step 6", 0, False, True, 0.5))
    clock.wait(18.1)
    again = open_at(tmp_path, clock, since=50)
    (killed,) = read(tmp_path)
    assert spent(killed) == {"setup": 10.0, "useful": 1.8, "other": 1.2}
    assert (killed.ending, killed.end, killed.highest, killed.next) == ("killed", 63 * SECOND, 5, 5)
    again.switch("other")
    again.close("finished")
    assert spent(read(tmp_path)[1]) == {"restarts": 17.0}
    assert clock.now == 80 * SECOND == read(tmp_path)[1].end


def test_an_attempt_that_is_closed_already_is_closed_once(tmp_path: Path) -> None:
    """It died between its line and the removal of what was open."""
    clock = Clock(0)
    ledger = open_at(tmp_path, clock, since=0)
    left = (tmp_path / "ledger.open.json").read_bytes()
    ledger.close("finished")
    (tmp_path / "ledger.open.json").write_bytes(left)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"attempt": 2, "hol')  # and a line that was cut off
    assert open_at(tmp_path, clock, since=0).attempt.attempt == 2 and len(read(tmp_path)) == 1


def test_other_ranks_leave_nothing(tmp_path: Path) -> None:
    ledger = open_at(tmp_path, Clock(5), since=0, kept=False)
    ledger.close("finished")
    assert not any(tmp_path.iterdir())


def test_who_leaves_without_a_word_has_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), open_ledger(tmp_path, True, 1, 0.0):
        raise ValueError("no")
    (attempt,) = read(tmp_path)
    assert attempt.ending == "failed" and set(spent(attempt)) <= {"setup", "other"}


def test_the_run_is_told_in_two_lines(tmp_path: Path) -> None:
    clock = Clock(0)
    ledger = open_at(tmp_path, clock, since=0)
    clock.wait(360)
    ledger.switch("useful")
    clock.wait(3240)
    ledger.close("finished")
    assert ledger.describe() == ["2.00 device-hours: useful 90.0%, setup 10.0%", "cost 72.00: useful 64.80, setup 7.20"]
    free = [Attempt(**{**json.loads((tmp_path / "ledger.jsonl").read_text()), "price": 0.0})] * 2
    assert describe(free) == ["4.00 device-hours in 2 attempts: useful 90.0%, setup 10.0%"]


def test_who_looks_changes_nothing(tmp_path: Path) -> None:
    """An attempt that is open is there as it was last written down; nobody closes it."""
    clock = Clock(0)
    first = open_at(tmp_path, clock, since=0)
    clock.wait(3600)
    first.close("finished")
    clock.wait(5)
    second = open_at(tmp_path, clock, since=3600)
    clock.wait(1800)
    second.take(0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = look(tmp_path)
    assert [(each.attempt, each.ending) for each in found] == [(1, "finished"), (2, "not closed")]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before and len(before) == 2
    parts = sum_parts(found)
    hours = sum(each.ranks * (each.end - each.begin) for each in found) / SECOND / 3600
    assert sum(each.hours for each in parts.values()) == pytest.approx(hours) and hours > 2.9
    assert sum(each.money for each in parts.values()) == pytest.approx(36 * hours)
    assert set(parts) == set(PARTS) and look(tmp_path / "none") == []


def test_devices_are_held_by_a_job_a_launcher_or_this_process() -> None:
    own, parent = read_start(os.getpid()), read_start(os.getppid())
    assert parent < own + SECOND
    alone, launched = find_holder({}), find_holder({"RANK": "0"})
    assert f"process {os.getpid()} of " in alone.name and f"process {os.getppid()} of " in launched.name
    assert abs(alone.since - own) < SECOND and abs(launched.since - parent) < SECOND
    job = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}
    assert find_holder(job).name == "job 7.0" and find_holder(job | {"SLURM_RESTART_COUNT": "2"}).name == "job 7.2"
    code = "import time, training.holder as h, os; print(time.time_ns() - h.read_start(os.getpid()))"
    age = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert 0 < age < 60 * SECOND
