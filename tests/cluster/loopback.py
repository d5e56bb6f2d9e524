"""A cluster with Slurm for users without root: all nodes are this machine, at 127.0.0.1, with a port each.

    with Loopback(Shape(nodes=2), folder) as cluster:
        cluster.run(["srun", "-N2", "printenv", "SLURMD_NODENAME"]).stdout        # n1, n2

What jobs, steps, arrays, dependencies, requeues and preemption do is Slurm's own. **Not faithful** is what a node is:

- all have this machine's name, address, processes and /dev/shm: a task knows its node by SLURMD_NODENAME alone, two
  nodes' ranks meet at 127.0.0.1 and may want the same port, and a process per node is not kept from another's;
- ``crash`` ends a node's slurmd; tasks that run there go on, and their connections stay;
- there are no links to cut or shape.

Slurm listens at 127.0.0.1 and believes what it is told about users (auth/none): while the cluster is up, whoever else
is logged in on this machine can run commands as you.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from client import LOGIN, Client
from settings import Shape, write_gres, write_slurm

from slurm import SLURM, lacking

LONGEST = 80  # a socket's path has 107 at most, and Slurm adds /n64/n64_12345.4294967291
KEEPER = Path(__file__).with_name("keeper.py")


class Loopback(Client):
    """Nodes ``n1``, ``n2``, ... on this machine. A context manager: it is there inside ``with``.

    ``folder`` takes configuration, state and logs; its path has at most 80 characters, for sockets are in it. Raises
    ValueError where that is longer, and on entering ClusterError where Slurm does not come up.
    """

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder, self.nodes = shape, folder.resolve(), shape.names
        if len(str(self.folder)) > LONGEST:
            raise ValueError(f"folder={self.folder} has more than {LONGEST} characters: take a shorter one")

    def __enter__(self) -> "Loopback":
        self._configure()
        with ExitStack() as opened:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", KEEPER],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self.environment(),
                cwd=self.folder,
                start_new_session=True,
            )
            opened.callback(self._end)
            assert self._keeper.stdin is not None
            daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", node] for node in self.nodes)]
            self._keeper.stdin.write(json.dumps(daemons) + "\n")
            self._keeper.stdin.flush()
            self.wait_idle()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def enter(self, host: str) -> list[str]:
        if host != LOGIN:
            raise ValueError(f"host {host!r} must be {LOGIN}: on the loopback there is no other")
        return ["setpriv", "--pdeathsig", "KILL"]

    def environment(self) -> dict[str, str]:
        return super().environment() | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def crash(self, node: str) -> None:
        """Ends a node's slurmd; what runs there goes on."""
        number = int((self.folder / f"slurmd-{node}.pid").read_text())
        os.kill(number, signal.SIGKILL)

    def _configure(self) -> None:
        self.ports = free_ports(1 + self.shape.nodes)
        controller, *ports = self.ports
        nodes = [f"NodeHostname=localhost NodeAddr=127.0.0.1 Port={port}" for port in ports]
        words = {"controller": "localhost(127.0.0.1)", "user": os.getuid(), "port": controller, "state": self.folder}
        for node in self.nodes:
            (self.folder / node).mkdir(exist_ok=True)
        (self.folder / "slurm.conf").write_text(write_slurm(self.shape, nodes, logs=self.folder, **words))
        (self.folder / "gres.conf").write_text(write_gres(self.shape, "/dev/tty"))

    def _end(self) -> None:
        self._keeper.communicate()


def can_make() -> str | None:
    """Why there can be no such cluster here, in words; None: there can be one."""
    return lacking(SLURM)


def free_ports(count: int) -> list[int]:
    """Ports at 127.0.0.1 that nobody listens on, as the system hands them out."""
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
