"""A cluster to play with: a shell where a user would log in, with `srun`, `sbatch`, `squeue` and `node`.

.venv/bin/python tests/cluster/shell.py --nodes 4                     a shell; the cluster ends with it
.venv/bin/python tests/cluster/shell.py --nodes 4 srun -N4 hostname   a command instead, and its exit code
.venv/bin/python tests/cluster/shell.py --loopback                    without root

node crash n2, node start n2, node cut n2, node heal n2     its power, its link
node enter n2                                               a shell on a node
"""

import argparse
import contextlib
import os
import pty
import signal
import sys
import tempfile
import threading
from pathlib import Path

from client import LOGIN, SEARCHED, Client
from settings import Shape

FAULTS = ("crash", "start", "cut", "heal")
NODE = """#!/bin/sh
case "$1" in
{faults}) echo "$1" "$2" >{folder}/told; exec cat {folder}/said;;
enter) exec srun --overlap --pty --nodelist="$2" bash;;
*) echo "node {words}|enter NAME" >&2; exit 2;;
esac
"""


def obey(cluster: Client, folder: Path) -> None:
    """Does to nodes what is written to ``folder``/told, a line at a time, and answers in ``folder``/said."""
    while True:
        fault, _, node = (folder / "told").read_text().strip().partition(" ")
        try:
            getattr(cluster, fault)(node)
            said = ""
        except Exception as error:
            said = f"{error}\n"
        (folder / "said").write_text(said)


def offer_faults(cluster: Client, folder: Path) -> dict[str, str]:
    """Puts the command `node` into ``folder`` -> the environment in which it is found."""
    os.mkfifo(folder / "told")
    os.mkfifo(folder / "said")
    words = "|".join(FAULTS)
    (folder / "node").write_text(NODE.format(faults=words, words=words, folder=folder))
    (folder / "node").chmod(0o755)
    threading.Thread(target=obey, args=(cluster, folder), daemon=True).start()
    return {"PATH": f"{folder}:{SEARCHED}"}


def run_shell(cluster: Client, words: list[str], environment: dict[str, str]) -> int:
    """Runs ``words``, or a shell, on the login host -> its exit code."""
    if words or not sys.stdin.isatty():
        process = cluster.open(words or ["bash"], environment=environment, stdin=None)
        with contextlib.suppress(KeyboardInterrupt):  # the command has it as well
            process.wait()
        return process.wait()
    # A session of its own: of that around it, a process in another pid namespace cannot tell which is in front.
    line = cluster.line(["setsid", "--ctty", "--wait", "bash"], LOGIN, None, environment)
    return os.waitstatus_to_exitcode(pty.spawn(line))


def main() -> int:
    import loopback

    import slurm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--cpus", type=int, default=4, help="that each node says it has")
    parser.add_argument("--gpus", type=int, default=0, help="that each node says it has")
    parser.add_argument("--loopback", action="store_true", help="all nodes are this machine: for users without root")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="command")
    told = parser.parse_args()
    if (reason := (loopback if told.loopback else slurm).can_make()) is not None:
        print(reason, file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="cluster-") as place:
        folder, shape = Path(place), Shape(told.nodes, told.cpus, told.gpus)
        with loopback.Loopback(shape, folder) if told.loopback else slurm.Cluster(shape, folder) as cluster:
            return run_shell(cluster, told.words, offer_faults(cluster, folder))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    sys.exit(main())
