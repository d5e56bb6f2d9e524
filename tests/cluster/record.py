"""What launchers tell the processes they start: environments recorded on a real Slurm, torchrun and Open MPI.

    python tests/cluster/record.py tests/unit/recorded            records all of them again, in half a minute
    python tests/cluster/record.py tests/unit/recorded srun       one

A file is {"command", "versions", "processes": [{"host", "environment"}, ...]}, a process for each that ``command``
started, in order of rank. Kept are the variables of the launchers, without values that are paths of this machine.
"""

import json
import os
import re
import socket
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from client import Client, until

KEPT = re.compile(
    "(SLURM|OMPI|PMI|PMIX|MPI|LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC)_.*|PMIX?.*|RANK|WORLD_SIZE|CUDA_VISIBLE_DEVICES"
)
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
ME = Path(__file__).resolve()
PROCESS = f"{sys.executable} {ME} process"
ELASTIC = (
    f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d"
    " --rdzv-endpoint=n1:29500 --rdzv-id=1"
)
STATIC = (
    f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=2 --node-rank=$SLURM_NODEID"
    " --master-addr=n1 --master-port=29500"
)
MPIRUN = "mpirun --allow-run-as-root"


class Recording(NamedTuple):
    """``line``, for bash, starts ``processes`` processes; ``batch``: it is the body of a batch script."""

    line: str
    processes: int
    batch: str = ""


RECORDINGS = {
    "srun": Recording(f"srun -N2 --ntasks-per-node=2 {PROCESS}", 4),
    "srun_cyclic": Recording(f"srun -N2 -n4 --distribution=cyclic {PROCESS}", 4),
    "srun_uneven": Recording(f"srun -N2 -n3 {PROCESS}", 3),
    "srun_one_task": Recording(f"srun -n1 {PROCESS}", 1),
    "srun_gpus": Recording(f"srun -N2 --ntasks-per-node=2 --gres=gpu:2 {PROCESS}", 4),
    "srun_gpu_each": Recording(f"srun -N2 --ntasks-per-node=2 --gpus-per-task=1 {PROCESS}", 4),
    "salloc": Recording(f"salloc -N2 --ntasks-per-node=2 {PROCESS}", 1),
    "srun_in_salloc": Recording(f"salloc -N2 --ntasks-per-node=2 srun {PROCESS}", 4),
    "batch": Recording(PROCESS, 1, "-N2 --ntasks-per-node=2"),
    "srun_in_batch": Recording(f"srun {PROCESS}", 4, "-N2 --ntasks-per-node=2"),
    "srun_after_requeue": Recording(
        f"if [ -z $SLURM_RESTART_COUNT ]; then scontrol requeue $SLURM_JOB_ID; exit; fi; srun {PROCESS}",
        4,
        "-N2 --ntasks-per-node=2 --requeue",
    ),
    "srun_in_array": Recording(f"srun {PROCESS}", 2, "--array=3-4 -n1"),
    "torchrun": Recording(f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node=2 {ME} process", 2),
    "torchrun_in_srun": Recording(f"srun -N2 --ntasks-per-node=1 --cpus-per-task=2 {ELASTIC} {ME} process", 4),
    "torchrun_static_in_srun": Recording(f"srun -N2 --ntasks-per-node=1 bash -c '{STATIC} {ME} process'", 4),
    "mpirun": Recording(f"{MPIRUN} --oversubscribe -n 2 {PROCESS}", 2),
    "mpirun_in_salloc": Recording(f"salloc -N2 --ntasks-per-node=2 {MPIRUN} {PROCESS}", 4),
    "mpirun_in_batch": Recording(f"{MPIRUN} {PROCESS}", 4, "-N2 --ntasks-per-node=2"),
    "mpirun_mapped": Recording(f"salloc -N2 --ntasks-per-node=2 {MPIRUN} --map-by node {PROCESS}", 4),
}


def keep_process(folder: Path) -> None:
    """What a recorded process does: it leaves its environment in ``folder``."""
    private = [str(ME.parents[2]), sys.prefix, sys.base_prefix, str(Path.home()), str(folder), tempfile.gettempdir()]
    environment = {
        name: value
        for name, value in sorted(os.environ.items())
        if KEPT.fullmatch(name) and not any(path in value for path in private)
    }
    said = {"host": socket.gethostname(), "environment": environment}
    path = folder / f"{socket.gethostname()}-{os.getpid()}"
    path.with_suffix(".part").write_text(json.dumps(said))
    path.with_suffix(".part").rename(path.with_suffix(".json"))


def record(cluster: Client, name: str, folder: Path) -> dict:
    """Runs a recording on ``cluster``, with an empty ``folder`` for what its processes leave -> a file's content."""
    line, processes, batch = RECORDINGS[name]
    line = line.replace(" process", f" process {folder}")
    if batch:
        script = folder / "job"
        script.write_text(f"#!/bin/bash\n{line}\n")
        job = cluster.submit(*batch.split(), f"--output={folder}/out", script, cwd=Path("/"))
        cluster.wait(job, "COMPLETED", restarts="--requeue" in batch)
    else:
        cluster.run(["bash", "-c", line], cwd=Path("/"))
    assert until(lambda: len(list(folder.glob("*.json"))) == processes, 10), f"{name}: not {processes} processes"
    said = sorted((json.loads(file.read_text()) for file in folder.glob("*.json")), key=rank)
    command = RECORDINGS[name].line.replace(sys.executable, "python").replace(str(ME), "record.py")
    return {
        "command": f"sbatch {batch} <<< '{command}'" if batch else command,
        "versions": versions(cluster),
        "processes": said,
    }


def rank(process: dict) -> tuple[int, ...]:
    """The order among recorded processes."""
    found = process["environment"]
    ranks = [int(found[name]) for name in RANKS if name in found]
    return int(found.get("SLURM_ARRAY_TASK_ID", 0)), *ranks


def versions(cluster: Client) -> dict[str, str]:
    slurm, mpi = (cluster.run([program, "--version"]).stdout.split("\n")[0] for program in ("srun", "mpirun"))
    return {"slurm": slurm.split()[-1], "openmpi": mpi.split()[-1], "torch": version("torch").partition("+")[0]}


def main() -> None:
    from settings import Shape

    from slurm import Cluster

    into, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as logs, Cluster(Shape(nodes=2, gpus=2), Path(logs)) as cluster:
        for name in names or RECORDINGS:
            with tempfile.TemporaryDirectory() as folder:
                said = record(cluster, name, Path(folder))
            (Path(into) / f"{name}.json").write_text(json.dumps(said, indent=1) + "\n")
            print(f"{name}: {len(said['processes'])} processes", flush=True)
            cluster.clear()


if __name__ == "__main__":
    sys.path.insert(0, str(ME.parents[2]))
    keep_process(Path(sys.argv[2])) if sys.argv[1] == "process" else main()
