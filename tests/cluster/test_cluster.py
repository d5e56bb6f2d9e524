"""The test cluster does what it says, on the daemons themselves: hosts, jobs, and faults of nodes.

Jobs are short scripts for bash that leave what they saw in files of the test's folder, which all nodes share.
"""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from client import ClusterError, until
from needed import require
from settings import Shape

from slurm import Cluster, lacking

FIRST = "[ -z $SLURM_RESTART_COUNT ]"  # bash: this is a job's first attempt
SEND = """
import socket, sys
with socket.create_connection(("n1", 7000)) as to:
    to.sendall(bytes(1_000_000))
    to.recv(1)
"""
RECEIVE = """
import socket
with socket.create_server(("", 7000)) as server:
    print("listening", flush=True)
    with server.accept()[0] as of:
        left = 1_000_000
        while left:
            left -= len(of.recv(left))
        of.sendall(b"1")
"""
MPI = """
from mpi4py import MPI
names = MPI.COMM_WORLD.gather(MPI.Get_processor_name())
if MPI.COMM_WORLD.rank == 0:
    print(*names)
"""


def write_job(folder: Path, *lines: str) -> list[str]:
    """Words for `sbatch`: a script of ``lines``, whose output is in ``folder``/out, one attempt after the other."""
    (script := folder / "job.sh").write_text("\n".join(("#!/bin/bash", f"cd {folder}", *lines, "")))
    return [f"--output={folder}/out", "--open-mode=append", str(script)]


def lines_of(path: Path) -> list[str]:
    """The lines of a file, if there is one, without those in which Slurm says that it ends a job."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if not line.startswith("slurmstepd")]


def test_nodes_are_hosts_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    look = f"touch /dev/shm/$(hostname) {tmp_path}/$(hostname); echo $(hostname -i) $(ls /dev/shm /var/tmp)"
    said = cluster.run(["srun", "-N2", "--label", "bash", "-c", look]).stdout
    assert sorted(said.splitlines()) == ["0: 10.77.0.1 /dev/shm: n1 /var/tmp:", "1: 10.77.0.2 /dev/shm: n2 /var/tmp:"]
    assert {path.name for path in tmp_path.iterdir()} == {"n1", "n2"}
    assert cluster.run(["hostname"]).stdout == "login\n"
    assert not Path("/etc/slurm/slurm.conf").exists()
    assert "slurmd" in (seen := cluster.run(["ps", "ax"], "n1").stdout) and "slurmctld" not in seen


def test_a_job_runs_to_its_end(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("-N2", *write_job(tmp_path, "echo batch on $(hostname)", "srun hostname", "exit 3"))
    said = cluster.wait(job, "FAILED")
    assert said["ExitCode"] == "3:0" and said["NodeList"] == "n[1-2]"
    first, *tasks = lines_of(tmp_path / "out")
    assert first == "batch on n1" and sorted(tasks) == ["n1", "n2"]


def test_an_array_and_a_job_that_depends_on_it(cluster: Cluster, tmp_path: Path) -> None:
    array = cluster.submit("--array=0-2", *write_job(tmp_path, "sleep 0.3; echo $SLURM_ARRAY_TASK_ID >>ran"))
    after = cluster.submit(
        f"--dependency=afterok:{array}", f"--output={tmp_path}/none", f"--wrap=cp {tmp_path}/ran {tmp_path}/ran2"
    )
    assert cluster.show(after)["Reason"] == "Dependency"
    cluster.wait(after, "COMPLETED")
    assert sorted(lines_of(tmp_path / "ran2")) == ["0", "1", "2"]


def test_devices_are_handed_out(cluster: Cluster) -> None:
    words = ["srun", "-N2", "--ntasks-per-node=2", "--gpus-per-task=1", "--label", "printenv", "CUDA_VISIBLE_DEVICES"]
    assert sorted(cluster.run(words).stdout.splitlines()) == ["0: 0", "1: 1", "2: 0", "3: 1"]
    with pytest.raises(ClusterError, match="Requested node configuration is not available"):
        cluster.run(["srun", "--gres=gpu:3", "true"])


def test_mpirun_starts_ranks_on_an_allocation(cluster: Cluster) -> None:
    require(lacking({"mpirun": "openmpi-bin"}))
    words = ["salloc", "-N2", "--ntasks-per-node=2", "mpirun", "--allow-run-as-root", sys.executable, "-c", MPI]
    assert cluster.run(words).stdout == "n1 n1 n2 n2\n"


def test_a_requeued_job_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    lines = f"{FIRST} && scontrol requeue $SLURM_JOB_ID && exit", "echo attempt $SLURM_RESTART_COUNT"
    job = cluster.submit("--requeue", *write_job(tmp_path, *lines))
    assert cluster.wait(job, "COMPLETED")["Restarts"] == "1"
    assert lines_of(tmp_path / "out") == ["attempt 1"]


def test_the_controller_comes_back_with_its_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """Stopped in order: one that is killed had seldom written down yet which jobs it had started, and ended these."""
    job = cluster.submit(*write_job(tmp_path, "while [ ! -e end ]; do sleep 0.1; done"))
    cluster.wait(job, "RUNNING")
    cluster.run(["pkill", "-TERM", "-x", "slurmctld"])
    assert until(lambda: "slurmctld" not in cluster.run(["ps", "ax"]).stdout, 30)
    assert cluster.run(["scontrol", "ping"], check=False).returncode
    cluster.run(["slurmctld"])
    cluster.wait(job, "RUNNING")
    (tmp_path / "end").touch()
    cluster.wait(job, "COMPLETED")


def submit_ticking(cluster: Cluster, folder: Path) -> tuple[str, str]:
    """A job that fills a node and writes ``attempt host`` ten times a second -> its number, and the node."""
    folder.mkdir()
    tick = "while sleep 0.1; do echo ${SLURM_RESTART_COUNT:-0} $(hostname) >>ticks; done"
    job = cluster.submit("--exclusive", "--requeue", *write_job(folder, tick))
    return job, cluster.wait(job, "RUNNING")["NodeList"]


def test_jobs_of_lost_nodes_run_elsewhere(cluster: Cluster, tmp_path: Path) -> None:
    """One node loses its power and one its network; on the latter, the old attempt goes on beside the new one."""
    (lost, crashed), (split, cut) = (submit_ticking(cluster, tmp_path / name) for name in ("lost", "split"))
    server = cluster.open([sys.executable, "-c", RECEIVE], crashed, stdout=subprocess.DEVNULL)
    assert until(lambda: ":7000" in cluster.run(["ss", "-ltn"], crashed).stdout, 10)
    peer = cluster.open(["bash", "-c", f"read <>/dev/tcp/{crashed}/7000"], cut)
    try:
        assert until(lambda: ":7000" in cluster.run(["ss", "-tn"], cut).stdout, 10)
        cluster.crash(crashed)
        cluster.cut(cut)
        assert server.wait(10)
        with pytest.raises(ValueError, match=f"host '{crashed}' must be one of"):
            cluster.run(["true"], crashed)
        elsewhere = [cluster.wait(job, "RUNNING", restarts=1, seconds=60)["NodeList"] for job in (lost, split)]
        assert not {crashed, cut} & set(elsewhere)
        assert "ESTAB" in cluster.run(["ss", "-tn"], cut).stdout, "a peer has heard of the crash"
        both = {f"0 {cut}", f"1 {elsewhere[1]}"}
        seen = len(lines_of(tmp_path / "split" / "ticks"))
        assert until(lambda: set(lines_of(tmp_path / "split" / "ticks")[seen:]) == both, 10)
        cluster.heal(cut)
        cluster.register(cut)
        cluster.start(crashed)
        cluster.wait_idle(cut, crashed)
        assert "job.sh" not in cluster.run(["ps", "ax"], cut).stdout
        assert set(lines_of(tmp_path / "lost" / "ticks")) == {f"0 {crashed}", f"1 {elsewhere[0]}"}
        assert cluster.run(["srun", f"--nodelist={crashed},{cut}", "hostname"]).stdout.split()
    finally:
        peer.kill()
        peer.wait()


def test_an_urgent_job_warns_and_requeues_another(cluster: Cluster, tmp_path: Path) -> None:
    lines = (
        f"{FIRST} || exit 0",
        "trap 'echo warned; scontrol requeue $SLURM_JOB_ID; exit' USR2",
        "echo ready; while sleep 0.1; do :; done",
    )
    job = cluster.submit("-N4", "--exclusive", "--requeue", "--signal=B:USR2@10", *write_job(tmp_path, *lines))
    assert until(lambda: lines_of(tmp_path / "out") == ["ready"], 30)
    urgent = cluster.submit("-N1", "--partition=urgent", f"--output={tmp_path}/none", "--wrap=sleep 1")
    cluster.wait(urgent, "COMPLETED")
    cluster.wait(job, "COMPLETED", restarts=1)
    assert lines_of(tmp_path / "out")[:2] == ["ready", "warned"]


def test_links_have_the_rate(cluster: Cluster) -> None:
    cluster.shape_links(8.0)
    receiver = cluster.open([sys.executable, "-c", RECEIVE], "n1", stdout=subprocess.PIPE)
    assert receiver.stdout is not None and receiver.stdout.readline()
    began = time.monotonic()
    cluster.run([sys.executable, "-c", SEND], "n2")
    assert time.monotonic() - began > 0.9  # at least that long is a fact: 1 MB at 1 MB/s, less what goes at once
    receiver.communicate()


def test_a_command_that_fails_says_what_it_said(cluster: Cluster) -> None:
    with pytest.raises(ClusterError, match=r"ls /nowhere on n2: exit code 2\nls: cannot access"):
        cluster.run(["ls", "/nowhere"], "n2")
    with pytest.raises(ClusterError, match=r"took more than 0.5 s\nstarted"):
        cluster.run(["bash", "-c", "echo started; exec sleep 4711"], timeout=0.5)
    assert until(lambda: "sleep 4711" not in cluster.run(["ps", "ax"]).stdout, 10)
    job = cluster.submit("--output=/dev/null", "--wrap=true")
    with pytest.raises(ClusterError, match=r"job \d+ is COMPLETED, not NEVER after 0 restarts"):
        cluster.wait(job, "NEVER")
    with pytest.raises(ValueError, match="node 'n5' must be one of n1, n2, n3, n4"):
        cluster.cut("n5")


@pytest.mark.parametrize(
    ("words", "said"), [({"nodes": 0}, "nodes=0"), ({"cpus": 0}, "cpus=0"), ({"gpus": -1}, "gpus=-1")]
)
def test_a_bad_shape_is_refused(words: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Shape(**words)
