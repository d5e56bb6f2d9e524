"""A cluster with Slurm on one machine, as real as it gets without a second one; up in a second, gone in less.

    login: slurmctld, your commands            n1: slurmd, tasks        n2: slurmd, tasks       ...
       10.77.0.200 on hub ============ port0 ===== wire 10.77.0.1 ...  port1 ===== wire 10.77.0.2

    with Cluster(Shape(nodes=2), folder) as cluster:           # folder: for the daemons' logs
        cluster.run(["srun", "-N2", "hostname"]).stdout        # n1, n2
        cluster.crash("n1")                                    # as if its power had been cut

A host is its own network (benchmarks/network.py), pid, mount, uts and ipc namespace (host.py): a name, an address,
processes, a /dev/shm, /run and /var/tmp that no other host sees. The rest of the file system is the machine's, so all
hosts share it, at the same paths. Slurm is Debian's, on its usual ports, configured in settings.py.

**Nothing is left, also after SIGKILL of the test.** A host's first process ends with the process that made the cluster,
by the kernel's word (PR_SET_PDEATHSIG), and all other processes of a host end with its first. Mounts and networks go
with the last process. The thread that makes the cluster has to live as long as that does.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from client import LOGIN, PATIENCE, SEARCHED, Client, ClusterError
from host import SPACES, Host
from settings import Shape, write_gres, write_slurm

from benchmarks import network
from benchmarks.network import Network, command, inside

LOGIN_ADDRESS = "10.77.0.200"
DEVICE = "/run/gpu"  # and a number: stands for a device of a node
SLURM = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "setpriv": "util-linux",
    "pkill": "procps",
}
PROGRAMS = SLURM | {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount"}
NAMES = "passwd: files\ngroup: files\nshadow: files\nhosts: files\n"  # nobody asks a network for a name


class Cluster(Client):
    """Hosts ``login`` and ``n1``, ``n2``, ... A context manager: it is there inside ``with``.

    ``folder`` takes the daemons' logs; ``local`` are folders of the machine that each host has for itself. Raises on
    entering OSError where there can be none (``can_make`` tells), ClusterError where Slurm does not come up.
    """

    def __init__(self, shape: Shape, folder: Path, local: Sequence[str] = ("/dev/shm", "/var/tmp")) -> None:  # noqa: S108
        self.shape, self.folder, self.local = shape, folder.resolve(), local
        self.nodes = shape.names
        self.network = Network(shape.nodes, None)
        self._hosts: dict[str, Host] = {}
        self._apart: set[str] = set()

    def __enter__(self) -> "Cluster":
        with ExitStack() as opened:
            opened.enter_context(self.network)
            opened.callback(self._end)
            with inside(self.network.links.hub):
                command("ip", f"address add {LOGIN_ADDRESS}/24 dev hub", "link set lo up")
            self._boot(LOGIN, *self.nodes)
            self.wait_idle()
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def enter(self, host: str) -> list[str]:
        if host not in self._hosts:
            raise ValueError(f"host {host!r} must be one of {', '.join(self._hosts)}, which are up")
        return self._hosts[host].enter()

    def crash(self, node: str) -> None:
        """Cuts a node's power: its processes and what it kept in memory are gone, its peers hear nothing more of it.

        They learn of it as on real hardware, by a timeout: no process of the node closes a connection.
        """
        self.cut(node)
        self._hosts.pop(node).end()

    def start(self, node: str) -> None:
        """Switches a crashed node on again: a fresh network, empty folders, slurmd. It registers some time later."""
        self.network.renew(self._number(node))
        self._apart.discard(node)
        self._boot(node)

    def cut(self, node: str) -> None:
        """Unplugs a node from the network: nothing arrives, nothing is refused. What runs on it goes on.

        It goes on reading and writing files too: they are the machine's, and no network is between.
        """
        self.network.plug(self._number(node), False)
        self._apart.add(node)

    def heal(self, node: str) -> None:
        """Plugs a node in again, within a second; connections that have not timed out go on.

        If Slurm had given it up it asks again only after half a minute or more: ``register`` is quicker.
        """
        self.network.plug(self._number(node), True)
        self._apart.discard(node)

    def register(self, node: str) -> None:
        """Has a node report to the controller now, which ends what should no longer run there."""
        self.run(["pkill", "-HUP", "-x", "slurmd"], node)

    def shape_links(self, megabits: float | None) -> None:
        """Gives all links a rate in Mbit/s, live; None: no limit."""
        self.network.shape(megabits)

    def clear(self) -> None:
        """Makes all as it was: no job, every node plugged in, up and idle, links without a limit."""
        self.run(["scancel", "--user=root"])
        for node in self.nodes:
            if node not in self._hosts:
                self.start(node)
            elif node in self._apart:
                self.heal(node)
                self.register(node)
        self.shape_links(None)
        self.wait_idle()

    def _number(self, node: str) -> int:
        if node not in self.nodes:
            raise ValueError(f"node {node!r} must be one of {', '.join(self.nodes)}")
        return self.nodes.index(node)

    def _boot(self, *hosts: str) -> None:
        """Starts hosts and their daemons, all at once."""
        spaces = dict(zip(self.nodes, self.network.links.ranks, strict=True)) | {LOGIN: self.network.links.hub}
        for host in hosts:
            self._hosts[host] = Host(host, spaces[host], self._tell(host), self.folder / f"{host}.boot")
        for host in hosts:
            self._hosts[host].wait_up()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started = {
            host: self.open(["slurmctld"] if host == LOGIN else ["slurmd", "-N", host], host, cwd=self.folder, **quiet)
            for host in hosts
        }
        for host, process in started.items():
            if process.wait(PATIENCE):
                raise ClusterError(f"the daemon of {host} did not start\n{self.log_ends()}")

    def _tell(self, host: str) -> dict[str, Any]:
        addresses = [f"10.77.0.{number + 1}" for number in range(self.shape.nodes)]
        words = {"controller": f"{LOGIN}({LOGIN_ADDRESS})", "user": "root", "port": 6817, "state": "/run/slurm"}
        slurm = write_slurm(self.shape, [f"NodeAddr={address}" for address in addresses], logs=self.folder, **words)
        named = [("127.0.0.1", "localhost"), (LOGIN_ADDRESS, LOGIN), *zip(addresses, self.nodes, strict=True)]
        return {
            "folders": ["/etc/slurm", *self.local],
            "files": {
                "/etc/slurm/slurm.conf": slurm,
                "/etc/slurm/gres.conf": write_gres(self.shape, DEVICE),
                f"/run/slurm/{host}/of": host,
            },
            "covers": {
                "/etc/hosts": "".join(f"{address} {name}\n" for address, name in named),
                "/etc/nsswitch.conf": NAMES,
            },
            "devices": [f"{DEVICE}{number}" for number in range(self.shape.gpus) if host != LOGIN],
        }

    def _end(self) -> None:
        for host in self._hosts.values():
            host.end()
        self._hosts.clear()


def can_make() -> str | None:
    """Why there can be no cluster here, in words; None: there can be one."""
    if (reason := lacking(PROGRAMS) or network.can_make()) is not None:
        return reason
    if not os.path.isdir("/etc/slurm"):
        return "the folder /etc/slurm, which comes with Debian's Slurm, is missing"
    made = subprocess.run(["unshare", *SPACES, "--fork", "mount", "-t", "proc", "proc", "/proc"], capture_output=True)
    return f"namespaces are refused: {made.stderr.decode().strip()}" if made.returncode else None


def lacking(programs: dict[str, str]) -> str | None:
    """The first of ``programs`` that is not there, and the package it is in."""
    for program, package in programs.items():
        if shutil.which(program, path=SEARCHED) is None:
            return f"the command `{program}` is missing: install {package}"
    return None
