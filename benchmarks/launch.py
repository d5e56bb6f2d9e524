"""From a command to its first step, and from a fault to the next step: every launcher, on a real Slurm of two nodes.

    python benchmarks/launch.py [--rounds 3]

    start       until "step 1/", against torchrun of an empty script of as many ranks, in the same round
    ranks       from a fault to the first word about it, and to the first step that is new: each kind, in one run
    nodes       the same for a node that is lost, with a spare and without one, and for a job that is to make room
    submission  `shoestring submit --dry-run` of 1024 nodes

Nodes are namespaces of this machine (tests/cluster), whose cores all ranks share; what the network costs is not in it.
Needs root and Debian's Slurm. Prints medians over the rounds.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "cluster")]

from client import until  # noqa: E402
from loopback import Loopback  # noqa: E402
from settings import Shape  # noqa: E402
from test_verdicts import FATAL, HEALTH, describe  # noqa: E402
from trained import PYTHON, WORDS, read_output, steps_of, submit, wait_for_step, write_text  # noqa: E402

from launcher.campaign import Mark  # noqa: E402
from launcher.ordeal import read_marks  # noqa: E402
from slurm import Cluster, can_make  # noqa: E402
from training.health.config import FailAt, Fault, Phase  # noqa: E402

TRAIN = [PYTHON, "-m", "launcher.train", *WORDS, "run.steps=1"]
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
SRUN = ["srun", "-N2", "--ntasks-per-node=2"]
AGENTS = ["srun", "-N2", "--ntasks-per-node=1", *TORCHRUN, "--nnodes=2", "--nproc-per-node=2"]
MEET = ["--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400"]
LAUNCHERS = {
    "torchrun, an empty script": [*TORCHRUN, "--nproc-per-node=4", "empty.py"],
    "the program itself": TRAIN,
    "torchrun": [*TORCHRUN, "--nproc-per-node=4", "-m", *TRAIN[2:]],
    "srun": [*SRUN, *TRAIN],
    "torchrun by srun": [*AGENTS, *MEET, "-m", *TRAIN[2:]],
    "mpirun": ["salloc", "-Q", "-N2", "--ntasks-per-node=2", "mpirun", "--allow-run-as-root", *TRAIN],
}
SPARE, MISSING, SILENT = "a lost node, a spare", "a lost node, no spare", "a lost node unknown to Slurm, a spare"
TOLD, DISPLACED = "told to stop, requeued", "displaced by another job"
NODES = {  # words of the run, what says that it was noticed
    SPARE: (["cluster.spares=1"], "was lost with its node"),
    SILENT: (["cluster.spares=1"], "was lost with its node"),
    MISSING: ([], "ranks start on"),  # nobody is left to say more
    TOLD: (["checkpoint.every=0"], "requeued: "),
    DISPLACED: (["checkpoint.every=0"], "requeued: "),
}
LONG = ("run.steps=100000", "run.eval_every=0", "checkpoint.every=4")
PATIENCE = 300  # seconds


class Times(NamedTuple):
    """Seconds from a fault."""

    noticed: float  # until there was a word about it
    again: float  # until a step had been taken that is new


class Watch:
    """Reads what a run prints and records, and when."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.lines: list[tuple[float, str]] = []
        self.steps: list[tuple[float, int]] = []  # how many there were

    def look(self) -> None:
        """Takes note of what is new."""
        now = time.time()
        self.lines += [(now, line) for line in read_output(self.run).splitlines()[len(self.lines) :]]
        taken = len(steps_of(self.run))
        if not self.steps or self.steps[-1][1] != taken:
            self.steps.append((now, taken))

    def find(self, pattern: str, since: float) -> float | None:
        """When a line was there that matches."""
        return next((when for when, line in self.lines if when >= since and re.search(pattern, line)), None)

    def reach(self, steps: int, since: float) -> float | None:
        """When so many steps had been taken."""
        return next((when for when, taken in self.steps if when >= since and taken >= steps), None)


def time_start(cluster: Cluster, folder: Path, name: str, run: str) -> float:
    """Seconds from the command to the end of its first step, or of the empty script."""
    words = LAUNCHERS[name]
    if name != next(iter(LAUNCHERS)):
        words = [*words, f"run.id={run}"]
    began = time.monotonic()
    process = cluster.open(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    for line in process.stdout:
        if "step 1/" in line:
            break
    else:
        process.wait()
    seconds = time.monotonic() - began
    process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} ended with exit code {process.returncode}")
    return seconds


def time_ranks(cluster: Cluster, folder: Path, run: str) -> dict[str, Times]:
    """One run that comes through each kind of fault that ends ranks."""
    faults = [FailAt((number * 3 + 1) % 4, 3 + 2 * number, Phase.backward, kind) for number, kind in enumerate(FATAL)]
    texts = ",".join(f"'{fault}'" for fault in faults)
    words = ("health.hang=6", *HEALTH)
    job, watch = submit(cluster, folder, run, *words, f"health.faults=[{texts}]"), Watch(folder / "runs" / run)

    def over() -> bool:
        watch.look()
        return cluster.show(job)["JobState"] in ("COMPLETED", "FAILED")

    if not until(over, 3 * PATIENCE):
        raise RuntimeError(f"{run} does not end")
    watch.look()
    found = {}
    for fault, mark in zip(faults, read_marks(watch.run, faults), strict=True):
        found[f"a rank: {fault.kind}"] = _read(watch, fault.kind, describe(fault), mark)
    return found


def _read(watch: Watch, kind: Fault, sign: str, mark: Mark | None) -> Times:
    assert mark is not None, sign
    # Told to end, a rank takes that step with the others and saves it.
    step = mark.step + (kind is Fault.term)
    noticed, again = watch.find(sign, mark.time), watch.reach(step, mark.time)
    assert noticed is not None and again is not None, (sign, mark, watch.lines)
    return Times(noticed - mark.time, again - mark.time)


def time_nodes(cluster: Cluster, folder: Path, name: str, run: str) -> Times:
    """A run that something happens to after its eighth step."""
    words, sign = NODES[name]
    job, watch = submit(cluster, folder, run, *LONG, *words), Watch(folder / "runs" / run)
    wait_for_step(watch.run, 8)
    harm: dict[str, Callable[[], object]] = {
        TOLD: lambda: cluster.run(["scancel", "--batch", "--signal=USR2", job]),
        DISPLACED: lambda: cluster.submit("--partition=urgent", "-N4", "--exclusive", "--wrap=sleep 1"),
        MISSING: lambda: cluster.crash("n1"),
    }
    watch.look()
    began, taken = time.time(), watch.steps[-1][1]
    harm.get(name, lambda: cluster.crash("n2"))()

    def goes_on() -> float | None:
        """When a step had been taken that is new, by those who went on."""
        watch.look()
        resumed = watch.find("goes on after step", began)
        return None if resumed is None else watch.reach(taken + 1, resumed)

    if not until(lambda: goes_on() is not None, PATIENCE):
        raise RuntimeError(f"{name}: the run does not go on\n{read_output(watch.run)}")
    noticed, again = watch.find(sign, began), goes_on()
    assert noticed is not None and again is not None
    cluster.run(["scancel", job])
    return Times(noticed - began, again - began)


def time_submission(cluster: Loopback, folder: Path) -> float:
    """Seconds of a dry run of 1024 nodes, Slurm's answer included."""
    words = [
        "run=deepseek_v3",
        "cluster=slurm",
        "cluster.nodes=1024",
        "parallel.pp=16",
        "parallel.tp=8",
        "parallel.ep=64",
        "--dry-run",
    ]
    began = time.monotonic()
    done = cluster.run([PYTHON, "-m", "launcher.submit", *words], cwd=folder)
    if "# Slurm says: Job" not in done.stdout:
        raise RuntimeError(done.stdout + done.stderr)
    return time.monotonic() - began


def show(title: str, columns: tuple[str, str], rows: dict[str, list[tuple[float, float]]]) -> None:
    """A table of medians."""
    print(f"\n{title:<44}{columns[0]:>10}{columns[1]:>10}")
    for name, found in rows.items():
        first, second = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{name:<44}{first:>10.2f}{second:>10.2f}", flush=True)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = range(parser.parse_args().rounds)
    if (reason := can_make()) is not None:
        sys.exit(reason)
    starts: dict[str, list[tuple[float, float]]] = {}
    ends: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="launch-") as name:
        folder = Path(name)
        write_text(folder)
        (folder / "empty.py").write_text("")
        with Cluster(Shape(nodes=4), folder) as cluster:
            for turn in rounds:
                base = 0.0
                for number, each in enumerate(LAUNCHERS):
                    seconds = time_start(cluster, folder, each, f"{number}-{turn}")
                    base = base or seconds
                    starts.setdefault(each, []).append((seconds, seconds / base))
            show("until the first step", ("s", "of empty"), starts)
            for turn in rounds:
                for each, times in time_ranks(cluster, folder, f"ranks-{turn}").items():
                    ends.setdefault(each, []).append(times)
                for number, each in enumerate(NODES):
                    if each != SILENT:
                        ends.setdefault(each, []).append(time_nodes(cluster, folder, each, f"nodes-{number}-{turn}"))
                        cluster.clear()
        for turn in rounds:  # a node that is lost stays so until Slurm knows
            with Cluster(Shape(nodes=4, patience=300), folder) as cluster:
                ends.setdefault(SILENT, []).append(time_nodes(cluster, folder, SILENT, f"silent-{turn}"))
        show("seconds from a fault to", ("a word", "a new step"), ends)
        with Loopback(Shape(nodes=1, cloud=1024), folder) as cluster:
            dry = statistics.median(time_submission(cluster, folder) for _ in rounds)
        print(f"\n1024 nodes submitted, dry: {dry:.2f} s")


if __name__ == "__main__":
    main()
