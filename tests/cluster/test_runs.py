"""One run, started by every launcher, and taken through what clusters do to runs: always with the same losses.

All on real Slurm daemons, torchrun and mpirun, on nodes with names, addresses and memory of their own.
"""

import json
from pathlib import Path

import pytest
from client import until
from nvml_library import build
from trained import (
    LONG,
    PYTHON,
    SECONDS,
    TRAIN,
    expect,
    read_output,
    read_state,
    steps_of,
    submit,
    wait_for_end,
    wait_for_step,
)

from slurm import Cluster
from training.metrics import read

AGENT = [PYTHON, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
LAUNCHERS = {
    "srun": ["srun", "-N2", "--ntasks-per-node=2", *TRAIN],
    "torchrun, c10d": [
        *("srun", "-N2", "--ntasks-per-node=1"),
        *(*AGENT, "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400", "-m", *TRAIN[2:]),
    ],
    "torchrun, static": [
        *("srun", "-N2", "--ntasks-per-node=1", "bash", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "bash"),
        *(*AGENT, "--master-addr=n1", "--master-port=29400", "-m", *TRAIN[2:]),
    ],
    "mpirun": ["salloc", "-Q", "-N2", "--ntasks-per-node=2", "mpirun", "--allow-run-as-root", *TRAIN],
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if "torchrun" in name else ()) for name in LAUNCHERS]
)
def test_every_launcher_trains_to_the_same_bits(cluster: Cluster, folder: Path, name: str) -> None:
    run = folder / "runs" / name.replace(", ", "-")
    done = cluster.run([*LAUNCHERS[name], f"run.id={run.name}", "run.steps=8"], cwd=folder, timeout=SECONDS)
    assert "step 8/8" in done.stdout and "\x1b" not in done.stdout, done.stdout
    nodes = {json.loads((run / "logs" / f"rank{rank}" / "heartbeat.json").read_text())["node"] for rank in range(4)}
    assert nodes == {"n1", "n2"}
    assert steps_of(run) == expect(folder, 8)


@pytest.mark.parametrize("name", ["srun", pytest.param("mpirun", marks=pytest.mark.full)])
def test_an_evaluation_is_what_the_run_measured(cluster: Cluster, folder: Path, name: str) -> None:
    """In the same layout to the bit, on two nodes."""
    start = LAUNCHERS[name][: -len(TRAIN)]
    words = ["-m", "launcher.evaluation", "long", "parallel.pp=2", "parallel.ep=2", "threads=1"]
    done = cluster.run([*start, PYTHON, *words], cwd=folder, timeout=SECONDS)
    assert done.stdout.count("held_out") == 1, done.stdout
    run = folder / "runs" / "long"
    (newest, *_) = sorted((run / "evaluations").glob("*/result.json"), reverse=True)
    assert json.loads(newest.read_text())["sets"]["held_out"]["loss"] == read(run / "metrics.jsonl", "eval")[-1]["loss"]


def test_a_submitted_run_that_is_told_of_its_end_goes_on_where_it_was(
    cluster: Cluster, folder: Path, tmp_path: Path
) -> None:
    """SIGUSR2, as before the end of a job's time: saved, back into the queue, at the next step; then to the end. Of all
    devices of both nodes the record has what they drew, and the ledger what they cost."""
    states = tmp_path / "states.txt"
    states.write_text("system devices 2\n")
    setup = f"export LD_LIBRARY_PATH={build(tmp_path).parent} NVML_STATES={states}"
    words = (*LONG, "checkpoint.every=0", f"cluster.setup=['{setup}']", "telemetry.every=0.2")
    run, job = folder / "runs" / "told", submit(cluster, folder, "told", *words)
    wait_for_step(run, 6)
    cluster.run(["scancel", "--batch", "--signal=USR2", job])
    cluster.wait(job, "PENDING", "RUNNING", restarts=1, seconds=SECONDS)
    taken = len(steps_of(run))
    said = wait_for_end(cluster, run, job)
    assert f"goes on after step {taken} " in said, said
    assert "requeued: asked to stop, and saved" in said
    assert steps_of(run) == expect(folder) and read_state(run)["state"] == "finished"
    assert read_state(run)["attempt"] == 1 and read_state(run)["restarts"] == 0, "that was no crash"
    devices = {(row["rank"], row["node"], row["device"]) for row in read(run / "metrics.jsonl", "device")}
    assert devices == {(0, "n1", 0), (1, "n1", 1), (2, "n2", 0), (3, "n2", 1)}
    first, second = (json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines())
    assert (first["ranks"], first["holder"] != second["holder"]) == (4, True)
    assert first["end"] < second["begin"], "what waits in the queue holds no device"
    for attempt in (first, second):
        assert sum(attempt["parts"].values()) == attempt["end"] - attempt["begin"]
        assert attempt["parts"]["useful"] > 0 == attempt["parts"]["recomputed"]
    assert "in 2 attempts: useful " in said


@pytest.mark.full
def test_a_job_that_is_told_of_its_end_before_it_trains_comes_back(cluster: Cluster, folder: Path) -> None:
    """In what its script sets up, and while the process loads that is to hear of it."""
    loading = 'pid=$(pgrep -f "[l]auncher.supervise") && grep -q "^SigBlk:.*4800$" /proc/$pid/status && kill -USR2 $pid'
    run, job = (
        folder / "runs" / "early",
        submit(cluster, folder, "early", *LONG, "cluster.setup=[echo set up, sleep 2]"),
    )
    assert until(lambda: "set up" in read_output(run), SECONDS)
    cluster.run(["scancel", "--batch", "--signal=USR2", job])
    first = cluster.wait(job, "RUNNING", restarts=1, seconds=SECONDS)["BatchHost"]

    def tell() -> bool:
        return not cluster.run(["bash", "-c", loading], first, check=False).returncode

    assert until(tell, SECONDS)
    cluster.wait(job, "RUNNING", restarts=2, seconds=SECONDS)
    cluster.run(["scancel", job])
    assert read_output(run).count("requeued: asked to stop") == 1 and not steps_of(run), read_output(run)


@pytest.mark.full
def test_a_job_that_another_one_displaces_loses_no_step(cluster: Cluster, folder: Path) -> None:
    run, job = folder / "runs" / "displaced", submit(cluster, folder, "displaced", *LONG, "checkpoint.every=0")
    wait_for_step(run, 6)
    urgent = cluster.submit("--partition=urgent", "-N4", "--exclusive", "--wrap=sleep 1")
    cluster.wait(urgent, "COMPLETED", seconds=SECONDS)
    wait_for_end(cluster, run, job)
    assert steps_of(run) == expect(folder), read_output(run)
    resumed = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"resume"' in line]
    assert len(resumed) == 1 and resumed[0]["step"] >= 6, "nothing was computed twice"


def test_a_killed_rank_is_named_and_all_are_started_again(cluster: Cluster, folder: Path) -> None:
    run, job = folder / "runs" / "killed", submit(cluster, folder, "killed", *LONG)
    wait_for_step(run, 8)
    pid = json.loads((run / "logs" / "rank3" / "heartbeat.json").read_text())["pid"]
    cluster.run(["kill", "-9", str(pid)], "n2")
    said = wait_for_end(cluster, run, job)
    assert "shoestring: rank 3 on n2 was ended by SIGKILL in " in said, said  # a step, or whatever is between two
    assert said.count("ranks start on n1, n2") == 2 and read_state(run)["restarts"] == 1
    assert steps_of(run) == expect(folder)


@pytest.mark.full
@pytest.mark.parametrize("heartbeat", ["0.5", "null"])
def test_an_attempt_that_lives_on_unseen_writes_no_checkpoint(cluster: Cluster, folder: Path, heartbeat: str) -> None:
    """A node is cut off, but sees the run's folder: it goes on, while the job is started again on another one. Its next
    heartbeat ends it, or else its next checkpoint."""
    words = ("run.steps=2000", "checkpoint.every=5", "cluster.nodes=1", "cluster.devices_per_node=4")
    run = folder / "runs" / f"fenced-{heartbeat}"
    job = submit(cluster, folder, run.name, *words, f"health.heartbeat={heartbeat}")
    wait_for_step(run, 8)
    node = cluster.show(job)["NodeList"]
    cluster.cut(node)
    cluster.wait(job, "RUNNING", restarts=1, seconds=SECONDS)
    assert cluster.show(job)["NodeList"] != node
    assert until(lambda: "writes nothing more" in read_output(run), SECONDS), read_output(run)
    cluster.heal(node)
    cluster.register(node)
    cluster.run(["scancel", job])
    assert steps_of(run)[:40] == expect(folder), read_output(run)


@pytest.mark.full
def test_torchrun_on_every_node_is_as_good_as_tasks(cluster: Cluster, folder: Path) -> None:
    words = ("cluster.launcher=torchrun", *LONG, "checkpoint.every=0")
    run, job = folder / "runs" / "agents", submit(cluster, folder, "agents", *words)
    wait_for_step(run, 6)
    cluster.run(["scancel", "--batch", "--signal=USR2", job])
    said = wait_for_end(cluster, run, job)
    assert "requeued: asked to stop, and saved" in said, said
    assert steps_of(run) == expect(folder)
