"""Submission and watching on a real Slurm: one job, chains, arrays, what is refused, and why a job waits, in words.

What trains is left out but in the last test: a program in place of the interpreter writes down its words and stays.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from client import until

from slurm import Cluster

ROOT = Path(__file__).parents[2]
SKIP = "verify=skip"  # as proofs have tests of their own
# Two nodes of two ranks.
WORDS = ("run=tiny", "cluster=slurm", "cluster.nodes=2", "cluster.devices_per_node=2", "run.micro_batch=2", SKIP)
RECORDER = """#!/bin/sh
[ "$1" = -P ] && shift
printf "%s\\n" "$PWD" "$@" >"$3/seen"
[ -e "$3/stay" ] || [ -e "$3/../stay" ] && exec sleep 100
exit 0
"""


class User:
    """Somebody at the login node, in a folder of their own."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.cluster, self.home = cluster, home
        self.recorder = home / "the python"
        self.recorder.write_text(RECORDER)
        self.recorder.chmod(0o755)

    def type(self, *words: str, code: int = 0, **environment: str) -> str:
        """Output and errors of a command, whose exit code is ``code``."""
        told = {"PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-m", "launcher.cli", *words]
        done = self.cluster.run(command, cwd=self.home, environment=told, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self, *words: str, code: int = 0, stay: str = "", **environment: str) -> str:
        """Of a job that trains nothing; with ``stay``, the id of its run, it runs until it is ended."""
        if stay:
            (self.home / "runs" / stay).mkdir(parents=True)
            (self.home / "runs" / stay / "stay").touch()
            words = (*words, f"run.id={stay}", "checkpoint.resume=auto")
        return self.type("submit", *WORDS, f"cluster.python='{self.recorder}'", *words, code=code, **environment)

    def job_of(self, run: str) -> str:
        return str(json.loads((self.home / "runs" / run / "jobs.jsonl").read_text().splitlines()[-1])["job"])


@pytest.fixture
def user(cluster: Cluster, tmp_path: Path) -> User:
    home = tmp_path / "a home; $(touch gone) %j"
    home.mkdir()
    return User(cluster, home)


def test_a_run_is_submitted_once_and_whole(user: User) -> None:
    said = user.submit("run.id=one", "cluster.timeout_min=5", "cluster.gres=gpu:2", 'cluster.setup=["echo ready"]')
    job, run = user.job_of("one"), user.home / "runs" / "one"
    assert f"\njob {job} of run runs/one\n" in said and "shoestring logs one follow=true" in said
    shown = user.cluster.wait(job, "COMPLETED")
    assert (shown["NumNodes"], shown["NumTasks"], shown["TimeLimit"]) == ("2", "4", "00:05:00")
    assert shown["JobName"] == "one" and shown["Requeue"] == "1" and shown["TresPerNode"] == "gres:gpu:2"
    where, module, name, folder = (run / "seen").read_text().splitlines()
    assert (where, module, name, folder) == (str(user.home), "-m", "launcher.supervise", str(run))
    assert (run / f"job-{job}.out").read_text() == "ready\n"
    assert {"config.yaml", "command.txt", "versions.json", "job.sbatch", "jobs.jsonl"} < {p.name for p in run.iterdir()}
    assert not (user.home / "gone").exists()


def test_a_dry_run_asks_slurm_and_leaves_nothing(user: User) -> None:
    said = user.submit("run.id=one", "--dry-run")
    assert "#SBATCH --nodes=2" in said and said.splitlines()[-1].startswith("# Slurm says: Job")
    assert "to start at" in said and "on nodes n[1-2]" in said
    refused = user.submit("run.id=one", "cluster.gres=gpu:3", "--dry-run", code=2)
    assert "shoestring: Slurm would refuse the job: " in refused and "not available" in refused
    assert list(user.home.iterdir()) == [user.recorder]


NOBODY = """
ClusterName=none
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=1
AuthType=auth/none
CredType=cred/none
MessageTimeout=1
NodeName=n1 NodeAddr=127.0.0.1
PartitionName=main Nodes=ALL Default=YES
"""


def test_where_slurm_does_not_answer_nobody_refuses(user: User, tmp_path: Path) -> None:
    (tmp_path / "slurm.conf").write_text(NOBODY)
    said = user.submit("--dry-run", code=2, SLURM_CONF=str(tmp_path / "slurm.conf"))
    assert "shoestring: Slurm could not be asked: " in said and "Unable to contact slurm controller" in said


def test_what_slurm_refuses_leaves_nothing(user: User) -> None:
    said = user.submit("run.id=one", "cluster.partition=nowhere", code=2)
    assert "shoestring: Slurm refuses the job: invalid partition specified: nowhere" in said
    said = user.submit("run.seed=1,2", "--multirun", "cluster.partition=nowhere", code=2)
    assert "invalid partition" in said and not list((user.home / "runs").iterdir())


def test_the_script_counts_and_not_the_environment(user: User) -> None:
    user.submit("run.id=one", "cluster.partition=main", SBATCH_PARTITION="urgent", SBATCH_QOS="")
    assert user.cluster.show(user.job_of("one"))["Partition"] == "main"


def test_a_sweep_is_an_array_of_runs(user: User) -> None:
    (user.home / "runs").mkdir()
    (stay := user.home / "runs" / "stay").touch()
    said = user.submit("run.name=seeds", "run.seed=1,2,3", "--multirun", "cluster.array_parallelism=1")
    array = said.partition("\njob ")[2].partition(",")[0]
    runs = sorted(path.parent for path in (user.home / "runs").glob("*/config.yaml"))
    jobs = {json.loads((run / "jobs.jsonl").read_text())["job"]: run for run in runs}
    assert sorted(jobs) == [f"{array}_{number}" for number in range(3)]
    assert until((jobs[f"{array}_0"] / "seen").exists, 60)
    waits = f"job      {array}_2: waits for other jobs of its array; cluster.array_parallelism"
    # Slurm has started the first before it has looked at the others.
    assert until(lambda: waits in user.type("status", jobs[f"{array}_2"].name), 60)
    stay.unlink()
    assert user.type("cancel", jobs[f"{array}_0"].name, "now=true").startswith(f"cancelled job {array}_0 of")
    assert until(lambda: all((run / "seen").exists() and (run / "seen").read_text() for run in runs), 60)
    for number in range(3):
        run = jobs[f"{array}_{number}"]
        assert (run / "seen").read_text().splitlines()[-1] == str(run)
        assert f"seed: {number + 1}\n" in (run / "config.yaml").read_text() and list(run.glob("job-*.out"))
    (place,) = (user.home / "runs").glob("*-array")
    assert {path.name for path in place.iterdir()} == {"job.sbatch", "0", "1", "2"}


def test_jobs_of_a_chain_are_one_run(user: User) -> None:
    user.submit(stay="one")
    first = user.job_of("one")
    user.cluster.wait(first, "RUNNING")
    again = ("run.id=one", "checkpoint.resume=auto")
    said = user.submit(*again, code=2)
    assert (
        f"run.id=one has job {first}, which is running: end it by `shoestring cancel one`, or let this job go on"
        in said
    )
    after = f"cluster.dependency=afterany:{first}"
    assert "run.steps must be what it is in runs/one/config.yaml" in user.submit(*again, after, "run.steps=9", code=2)
    user.submit(*again, after)
    second = user.job_of("one")
    said = user.type("status", "one")
    assert said.startswith("runs/one: running\n") and f"job      {first}: running on n[1-2] for " in said
    assert f"job      {second}: waits for the jobs of cluster.dependency (afterany:{first}" in said
    assert not (user.home / "runs" / "one" / "before").exists()
    said = user.type("cancel", "one", "now=true")
    assert said == f"cancelled job {first}, {second} of runs/one\n"
    user.cluster.wait(second, "CANCELLED")
    assert user.type("status", "one").startswith(f"runs/one: cancelled\njob      {second}: cancelled after 0:00\n")
    assert "its jobs are over" in user.type("cancel", "one", code=2)


def test_a_run_that_is_submitted_again_leaves_out_unfit_nodes(user: User) -> None:
    """Beside those that its configuration leaves out."""
    user.submit("run.id=one", "cluster.exclude=n4")
    user.cluster.wait(user.job_of("one"), "COMPLETED")
    assert user.cluster.show(user.job_of("one"))["ExcNodeList"] == "n4"
    (user.home / "runs" / "one" / "excluded.json").write_text('{"n1": "sending: 0.02 Gbit/s"}\n')
    user.submit("run.id=one", "cluster.exclude=n4", "checkpoint.resume=auto")
    shown = user.cluster.wait(user.job_of("one"), "COMPLETED")
    assert shown["ExcNodeList"] == "n[1,4]" and shown["NodeList"] == "n[2-3]"


@pytest.mark.parametrize(
    ("word", "said", "code"),
    [
        ("{hold: true}", "is held by its user; release it: scontrol release", 1),
        ("{begin: now+1hour}", "waits for the time that it may begin at", 0),
        ("{nodelist: n9}", "", 2),
    ],
)
def test_why_a_job_waits(word: str, said: str, code: int, user: User) -> None:
    submitted = user.submit("run.id=one", f"cluster.additional_parameters={word}", code=2 if code == 2 else 0)
    if code == 2:
        assert "Invalid node name specified" in submitted
        return
    assert said in user.type("status", "one", code=code)
    (line,) = [line for line in user.type("runs").splitlines() if line.startswith("one")]
    assert line.split() == ["one", "waiting", "0/300", user.job_of("one"), *line.split()[-3:]]


def test_why_a_job_waits_for_nodes(user: User) -> None:
    user.submit("cluster.nodes=4", "run.global_batch=16", "cluster.devices_per_node=4", "run.micro_batch=1", stay="big")
    user.cluster.wait(user.job_of("big"), "RUNNING")
    user.submit("run.id=two")
    assert until(lambda: "is next, and waits until enough nodes are free" in user.type("status", "two"), 60)
    user.submit("run.id=many", "cluster.nodes=8", "run.global_batch=16", "run.micro_batch=1")
    said = user.type("status", "many")  # PartitionConfig, and PartitionNodeLimit once it has been looked at
    assert "asks for what its partition does not have" in said or "asks for more nodes than its partition has" in said


def test_a_node_that_goes_and_a_job_that_is_told_to_end(user: User) -> None:
    user.submit(stay="one")
    job = user.job_of("one")
    user.cluster.wait(job, "RUNNING")
    assert until((user.home / "runs" / "one" / "seen").exists, 60)
    assert "told job" in user.type("cancel", "one")
    user.cluster.wait(job, "FAILED", "COMPLETED", "CANCELLED")


def test_ranks_of_srun_do_not_submit(user: User) -> None:
    told = {"PYTHONPATH": str(ROOT)}
    words = ["srun", "-n2", sys.executable, "-m", "launcher.cli", "submit", *WORDS]
    done = user.cluster.run(words, cwd=user.home, environment=told, check=False)
    line = (
        "shoestring: submit must be typed once, and this is one of 2 processes that srun has started: call it outside"
    )
    assert done.stderr.splitlines().count(line) == 2
    alone = user.cluster.run(["srun", "-n1", *words[2:], "run.id=one"], cwd=user.home, environment=told)
    assert "\njob " in alone.stdout


def test_the_script_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    """Three lines changed, as its first lines say."""
    user = User(cluster, tmp_path)
    text = (ROOT / "slurm" / "train.sbatch").read_text()
    text = text.replace("--nodes=2 --ntasks-per-node=8 --gres=gpu:8", "--nodes=2 --ntasks-per-node=2 --gres=gpu:1")
    text = text.replace("--time=24:00:00", "--time=10")
    text = text.replace("words=(run=small run.id=mine)", "words=(run=tiny run.id=mine run.micro_batch=2 verify=skip)")
    bin_folder = user.home / "bin"
    bin_folder.mkdir()
    # `python` is the real one until the script's last line.
    (bin_folder / "python").write_text(
        f'#!/bin/sh\n[ "$2" = launcher.supervise ] || exec {sys.executable} "$@"\nprintf "%s\\n" "$@" >"$3/seen"\n'
    )
    (bin_folder / "python").chmod(0o755)
    (user.home / "mine.sbatch").write_text(text)
    told = {"PYTHONPATH": str(ROOT), "PATH": f"{bin_folder}:/usr/bin:/bin"}
    for _ in range(2):  # the second goes on with the run of the first
        submitted = user.cluster.run(["sbatch", "--parsable", "mine.sbatch"], cwd=user.home, environment=told)
        user.cluster.wait(job := submitted.stdout.strip(), "COMPLETED")
        run = user.home / "runs" / "mine"
        assert (run / "seen").read_text().splitlines() == ["-m", "launcher.supervise", str(run)]
        said = (user.home / f"job-{job}.out").read_text()
        assert said == "verify=skip: dp=4 tp=1 ep=1, engine native starts without a proof\n"
    assert len((run / "jobs.jsonl").read_text().splitlines()) == 2 and (run / "before" / "1" / "config.yaml").exists()


def test_a_submitted_run_trains_and_is_watched(user: User, text: Path) -> None:
    steps, corpus = 6, next(path for path in text.rglob("*") if path.suffix in (".txt", ".md", ".py"))
    words = (
        "run.id=real",
        f"run.steps={steps}",
        f"data.corpus=['{corpus}']",
        "run.sample.tokens=0",
        "preflight.slow=20",  # the nodes share two processors with other tests
    )
    small = ("run.global_batch=2", "data.sequence_length=32", "run.micro_batch=1", "run.compile=off", "run.threads=1")
    said = user.type("submit", *WORDS, "cluster.devices_per_node=1", *small, *words, "verify=auto", "proofs=proofs")
    assert "dp=2 tp=1 ep=1, engine native has no proof yet: proving it ... passed in" in said
    (proof,) = (user.home / "proofs").iterdir()
    assert json.loads((user.home / "runs" / "real" / "proof.json").read_text())["hash"] in proof.name
    told = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "launcher.cli", "logs", "real", "follow=true", "rank=1"]
    with user.cluster.open(command, cwd=user.home, environment=told, stdout=subprocess.PIPE) as follower:
        try:
            user.cluster.wait(user.job_of("real"), "COMPLETED", seconds=150)
            printed, _ = follower.communicate(timeout=60)
        finally:
            follower.kill()
    assert f"rank 1 | step {steps}/{steps}  loss" in printed
    said = user.type("status", "real")
    assert said.startswith("runs/real: finished\n") and f"steps    {steps} of {steps} (100%)  loss" in said
    assert "rank 0 | step 6/6" in user.type("logs", "real")
    assert "nothing to end" in user.type("cancel", "real", code=2)
