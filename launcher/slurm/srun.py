"""Ranks as a step of a job: what srun is told, and what it says of those that ended.

srun --nodes=2 --ntasks=8 ... python -m launcher.child runs/<id>                        each rank is a task
srun --nodes=2 --ntasks=2 ... python -m torch.distributed.run ... -m launcher.child     an agent a node starts them

srun: error: n2: tasks 4-5: Killed                      {4: -9, 5: -9}
srun: error: n1: task 0: Exited with exit code 1        {0: 1}
"""

import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from configs.cluster import ClusterConfig, Launcher

SAID = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>.+)$")
EXITED = re.compile(r"Exited with exit code (\d+)")
LOST = re.compile(r"^srun: error: Node failure on (?P<nodes>\S+)")
SIGNALS = {signal.strsignal(number): number for number in signal.Signals}


class Layout(NamedTuple):
    """Which nodes of a job the ranks of a step are on."""

    nodes: tuple[str, ...]
    ranks: int  # of each node


class Outcome(NamedTuple):
    """How a step ended."""

    code: int  # srun's
    codes: dict[int, int]  # of ranks that ended badly, negative for a signal
    lost: tuple[str, ...]  # nodes


def write_command(layout: Layout, config: ClusterConfig, run: Path) -> list[str]:
    """srun's command line. Where ranks meet is in its environment."""
    nodes, here = len(layout.nodes), layout.ranks
    python = config.python or sys.executable
    program = [python, "-u", "-m", "launcher.child", str(run)]
    if config.launcher is Launcher.torchrun:
        program, here = [python, "-u", "-m", "launcher.slurm.agent", str(here), str(run)], 1
    words = ["srun", f"--nodes={nodes}", f"--nodelist={','.join(layout.nodes)}"]
    words += [f"--ntasks={nodes * here}", f"--ntasks-per-node={here}"]
    words += [
        *("--distribution=block", "--kill-on-bad-exit=1", "--no-kill", "--overlap", "--mpi=none", "--input=none"),
        *("--export=ALL", f"--job-name={run.name}"),
    ]
    if (cores := os.environ.get("SLURM_CPUS_PER_TASK")) is not None:
        words.append(f"--cpus-per-task={cores}")  # since 22.05 srun does not take it from the job
    if config.container_image is not None:
        words.append(f"--container-image={config.container_image}")
        words += [f"--container-mounts={','.join(config.container_mounts)}"] * bool(config.container_mounts)
    return [*words, *program]


def read_lines(lines: Sequence[str]) -> tuple[dict[int, int], tuple[str, ...]]:
    """What srun has said: exit codes of tasks, and nodes that it has lost."""
    codes: dict[int, int] = {}
    lost: list[str] = []
    for line in lines:
        if (found := SAID.match(line)) is not None:
            exited = EXITED.match(found["how"])
            code = int(exited[1]) if exited else -SIGNALS.get(found["how"].split(" (")[0], signal.SIGKILL)
            codes |= dict.fromkeys(expand(found["tasks"]), code)
        elif (found := LOST.match(line)) is not None:
            lost.append(found["nodes"])
    return codes, tuple(lost)


def expand(text: str) -> list[int]:
    """``0-2,5`` is [0, 1, 2, 5]."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def has_ended_badly(lines: Sequence[str]) -> bool:
    """Whether srun has said so of a task, or of a node."""
    return any(SAID.match(line) or LOST.match(line) for line in lines)
