"""What srun is told and what it says, as it said it on a real cluster; attempts that are started again, or not."""

import json
import signal
import sys
from pathlib import Path

import pytest

from configs.cluster import ClusterConfig, Launcher, Scheduler
from launcher import report, restarts
from launcher.compose import Composer
from launcher.logs import log_of
from launcher.slurm.srun import Layout, expand, read_lines, write_command
from training.checkpoint import fence

KILLED = """\
srun: error: n2: task 2: Killed
srun: launch/slurm: _step_signal: Terminating StepId=2.0
slurmstepd-n1: error: *** STEP 2.0 ON n1 CANCELLED AT 2026-11-30T21:23:43 ***
srun: error: n2: task 3: Terminated
srun: error: n1: tasks 0-1,5: Exited with exit code 7
srun: error: n1: task 4: Segmentation fault (core dumped)
srun: Force Terminated StepId=2.0
"""
LOST = """\
srun: error: Node failure on n2
slurmstepd-n1: error: *** STEP 3.0 ON n1 CANCELLED AT 2026-11-30T21:29:06 DUE TO NODE FAILURE, SEE SLURMCTLD LOG ***
srun: error: Timed out waiting for job step to complete
"""


def test_srun_says_how_tasks_ended() -> None:
    codes, lost = read_lines(KILLED.splitlines())
    assert codes == {2: -signal.SIGKILL, 3: -signal.SIGTERM, 0: 7, 1: 7, 5: 7, 4: -signal.SIGSEGV} and lost == ()
    assert read_lines(LOST.splitlines()) == ({}, ("n2",))
    assert expand("0-2,5") == [0, 1, 2, 5]


def test_ranks_are_tasks_or_an_agent_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    layout, run = Layout(("n1", "n3"), 4), Path("/shared/a run")
    config = ClusterConfig(scheduler=Scheduler.slurm, nodes=2, devices_per_node=4)
    words = write_command(layout, config, run)
    assert {"--nodelist=n1,n3", "--ntasks=8", "--ntasks-per-node=4", "--kill-on-bad-exit=1"} <= set(words)
    assert words[-5:] == [sys.executable, "-u", "-m", "launcher.child", "/shared/a run"]
    config = ClusterConfig(
        scheduler=Scheduler.slurm,
        nodes=2,
        launcher=Launcher.torchrun,
        container_image="image.sqsh",
        container_mounts=("/a:/b", "/c:/c:ro"),
        python="/opt/python",
    )
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    words = write_command(layout, config, run)
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"} <= set(words)
    assert {"--container-image=image.sqsh", "--container-mounts=/a:/b,/c:/c:ro"} <= set(words)
    assert words[-6:] == ["/opt/python", "-u", "-m", "launcher.slurm.agent", "4", "/shared/a run"]


def test_a_lost_node_is_the_root(tmp_path: Path) -> None:
    """Its ranks say nothing; what others say comes of that."""
    for rank in range(4):
        log_of(tmp_path, rank).parent.mkdir(parents=True)
    error = {"rank": 0, "node": "n1", "time": 1, "action": "step 3", "error": "KeyError: 'x'", "stack": "Traceback"}
    (tmp_path / "logs" / "rank0" / "record.json").write_text(json.dumps(error))
    deaths = report.read_deaths(tmp_path, {0: 1, 1: None, 2: None, 3: None})
    assert deaths[0].rank == 0
    deaths = report.lose(deaths, range(2, 4), "n2")
    assert [death.rank for death in deaths][:2] == [2, 3]
    said = report.describe(tmp_path, deaths)
    assert said.startswith("shoestring: rank 2 on n2 was lost with its node, of which nothing is heard any more\n")
    assert "then rank 0 on n1 raised KeyError: 'x' in step 3" in said
    report.keep_verdict(tmp_path, deaths)
    verdict = report.read_verdict(tmp_path)
    assert verdict is not None and (verdict.rank, verdict.node, verdict.cause) == (2, "n2", "node")


class Attempts:
    """Attempts at a run that end one after the other as they are told; the run has taken a step."""

    def __init__(self, run: Path, *ends: tuple[int, str]) -> None:
        self.run, self.ends, self.names = run, list(ends), list[str]()
        (run / "config.yaml").write_text(Composer().compose(())[1])
        (run / "metrics.jsonl").write_text('{"kind": "step", "step": 0}\n')

    def __call__(self, name: str) -> int:
        code, error = self.ends[len(self.names)]
        self.names.append(name)
        log_of(self.run, 0).parent.mkdir(parents=True, exist_ok=True)
        if error:
            report.keep_verdict(self.run, [report.Death(3, 1, error, "", 1.0)])
        return code


DIED, LOST_NODE = restarts.DIED, restarts.LOST


def test_the_same_fault_three_times_over_ends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = Attempts(tmp_path, *[(DIED, "KeyError: 'x'")] * 9)
    assert restarts.start(tmp_path, attempts, 100, "7.0") == DIED
    assert attempts.names == ["7.0.0", "7.0.1", "7.0.2"] and fence.read(tmp_path) == "7.0.2"
    assert "not started again: rank 3 raised KeyError: 'x', 3 times over" in capsys.readouterr().err


def test_other_faults_are_counted_and_lost_nodes_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ends = [(DIED, f"KeyError: {number}") for number in range(9)]
    attempts = Attempts(tmp_path, ends[0], (LOST_NODE, ""), (LOST_NODE, ""), *ends[1:])
    assert restarts.start(tmp_path, attempts, 2, "7.0") == DIED
    assert len(attempts.names) == 5 and "not started again: run.restarts=2" in capsys.readouterr().err


def test_a_run_that_another_attempt_has_is_left_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempts = Attempts(tmp_path, (DIED, ""), (DIED, ""))

    def begin(name: str) -> int:
        fence.claim(tmp_path, "8.1.0")
        return attempts(name)

    assert restarts.start(tmp_path, begin, 2, "7.0") == DIED
    assert attempts.names == ["7.0.0"] and "the run has been, as 8.1.0" in capsys.readouterr().err
    assert fence.read(tmp_path) == "8.1.0"


def test_an_attempt_of_before_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fence.enter(tmp_path).check()  # nobody has claimed the run
    fence.claim(tmp_path, "7.0.0")
    monkeypatch.setenv(fence.VARIABLE, "7.0.0")
    mine = fence.enter(tmp_path)
    mine.check()
    fence.claim(tmp_path, "7.1.0")
    with pytest.raises(fence.SupersededError, match=r"started again since, as 7\.1\.0: this attempt, 7\.0\.0,"):
        mine.check()
    assert fence.enter(tmp_path).attempt == "7.0.0", "also where it begins only now"
