"""A network to measure on: ranks of one machine, each in a network namespace, on links of a chosen rate.

    rank 0: wire ====== port0 |                            | port1 ====== wire :rank 1
                              | hub, a bridge in its own   |
    rank 2: wire ====== port2 | network namespace          | port3 ====== wire :rank 3

    python benchmarks/network.py --ranks 4 --rate 200 --rate 1000         what gloo gets through, a line for each rate

A link is a veth pair with a token bucket (tbf) at both ends: ``wire`` limits what a rank sends, ``port`` what it gets.

    with Network(ranks=4, megabits=1000.0) as network:
        network.run(function, network.links)      # function(rank, world, store, links) in four processes
        network.shape(200.0)                      # or links.shape(200.0) in a rank, between two rounds

**Nothing outside is touched, and nothing is left.** Namespaces have no names: this process holds a descriptor of each,
ranks live in theirs and end with this process. When all have ended, by SIGKILL too, the kernel removes the namespaces
with the bridge, links and queues in them.

**No packet is lost.** A bucket that overflows would cost a sender 200 ms whenever the last packet of a message is hit.
What a connection may have on its way is bounded by the receiver's buffer (``window``), and a bucket has room for
that many bytes of hundreds of connections. The same bound keeps a small message from waiting long behind a large one.
A bucket lets through ``BURST`` seconds at once; packets that are longer (the kernel hands over up to 64 kB at a time)
are cut to the MTU first. Ranks of one machine share its processors: rates above what these copy are not reached.
"""

import ctypes
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

CLONE_NEWNET = 0x40000000  # <sched.h>
MOST = 128  # ranks: addresses are 10.77.0.1, 10.77.0.2, ...
MTU = 9000  # bytes
BURST, LEAST_BURST = 0.5e-3, 20_000  # seconds of the rate; bytes
ROOM = 64 << 20  # bytes that may wait before a link
SILENT = "ended without an answer"
WINDOW = 131072  # bytes that a connection may have on its way
# Of every namespace. Reno is there in every kernel, and with no packet lost it never slows down.
SETTINGS = {
    "ipv4/tcp_congestion_control": "reno",
    "ipv4/tcp_slow_start_after_idle": "0",
    "ipv6/conf/default/disable_ipv6": "1",
}


class RankError(Exception):
    """A rank raised or ended. The message holds its number and traceback."""


class Links(NamedTuple):
    """Paths of the namespaces. A small value: a rank that is given it can change the rate as well."""

    hub: str
    ranks: tuple[str, ...]

    def shape(self, megabits: float | None) -> None:
        """Gives all links, in both directions, a rate in Mbit/s, at once and live; None: no limit.

        Takes a few milliseconds, in which links differ. A message on its way goes on at the new rate; what waits on a
        link is lost, and sent again, when the limit ends. Raises ValueError for a rate that is none, OSError where the
        kernel refuses it.
        """
        queue = describe(megabits)
        with inside(self.hub):
            command("tc", *(f"qdisc replace dev port{rank} root {queue}" for rank in range(len(self.ranks))))
        for path in self.ranks:
            with inside(path):
                command("tc", f"qdisc replace dev wire root {queue}")


class Network:
    """``ranks`` namespaces on a bridge, each link at ``megabits`` Mbit/s in both directions (None: no limit).

    A connection has at most ``window`` bytes on its way: more is for fast links, less for small messages beside large.
    A context manager: it is there inside ``with``. Raises ValueError for a bad number of ranks or rate, and on entering
    OSError where networks cannot be made (``can_make`` tells).
    """

    def __init__(self, ranks: int, megabits: float | None, window: int = WINDOW) -> None:
        if not 1 <= ranks <= MOST:
            raise ValueError(f"ranks={ranks} must be from 1 to {MOST}")
        describe(megabits)
        self.ranks, self.megabits, self.window = ranks, megabits, window

    def __enter__(self) -> "Network":
        with ExitStack() as opened:
            paths = []
            for _ in range(self.ranks + 1):
                descriptor = make_namespace(self.window)
                opened.callback(os.close, descriptor)
                paths.append(f"/proc/{os.getpid()}/fd/{descriptor}")
            self.links = Links(paths[0], tuple(paths[1:]))
            with inside(self.links.hub):
                command("ip", "link add hub type bridge", "link set hub up")
            self._connect(*range(self.ranks))
            self.shape(self.megabits)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def shape(self, megabits: float | None) -> None:
        """Changes the rate of all links: ``Links.shape``."""
        self.links.shape(megabits)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(rank, world, store, *args)`` in one process in each namespace -> what each returned, by rank.

        ``function`` is importable; ``store`` is the path for a file store, fresh for each run; gloo is told to use the
        rank's link. Raises RankError at the first failure; all processes have ended when this returns or raises.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"] if "torch" in sys.modules else [])
        processes, channels = [], []
        with tempfile.TemporaryDirectory(prefix="network-") as folder:
            try:
                for rank, path in enumerate(self.links.ranks):
                    channel, theirs = context.Pipe(duplex=False)
                    work = (function, rank, self.ranks, Path(folder) / "store", *args)
                    processes.append(context.Process(target=_serve, args=(path, theirs, *work), daemon=True))
                    processes[-1].start()
                    theirs.close()
                    channels.append(channel)
                return _collect(channels)
            finally:
                for process in processes:
                    process.kill()
                for process in processes:
                    process.join()

    def plug(self, rank: int, plugged: bool) -> None:
        """Unplugs a rank's link at once (nothing arrives, nothing is refused), or plugs it in, within a second."""
        with inside(self.links.hub):
            command("ip", f"link set port{rank} {'up' if plugged else 'down'}")

    def renew(self, rank: int) -> None:
        """Gives a rank a new namespace and link: what is left of connections in the old one is never heard of again."""
        with inside(self.links.hub):
            command("ip", f"link delete port{rank}")
        fresh = make_namespace(self.window)
        os.dup2(fresh, int(Path(self.links.ranks[rank]).name), inheritable=False)
        os.close(fresh)
        self._connect(rank)

    def _connect(self, *ranks: int) -> None:
        ports = [
            line
            for rank in ranks
            for line in (
                f"link add port{rank} mtu {MTU} type veth peer name wire mtu {MTU} address {hardware(rank)}"
                f" netns {self.links.ranks[rank]}",
                f"link set port{rank} master hub up",
            )
        ]
        with inside(self.links.hub):
            command("ip", *ports)
        for rank in ranks:
            with inside(self.links.ranks[rank]):
                command("ip", f"address add 10.77.0.{rank + 1}/24 dev wire", "link set wire up", "link set lo up")


def describe(megabits: float | None) -> str:
    """The queue of a link, in the words of `tc`. Raises ValueError for a rate that is none."""
    if megabits is None:
        return "noqueue"
    if not (math.isfinite(megabits) and megabits >= 0.1):
        raise ValueError(f"megabits={megabits} must be a rate in Mbit/s, at least 0.1, or None for no limit")
    burst = max(LEAST_BURST, round(megabits * 125e3 * BURST))
    return f"tbf rate {round(megabits * 1e6)}bit burst {burst} limit {ROOM + burst}"


def hardware(rank: int) -> str:
    """A rank's address on the wire, the same when it is renewed: its peers have it in their tables."""
    return f"02:00:0a:4d:00:{rank + 1:02x}"


def can_make() -> str | None:
    """Why no network can be made here, in words; None: it can. Makes one, in some 20 ms."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are a thing of Linux"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"the command `{program}` is missing: install iproute2"
    try:
        with Network(1, 1000.0):
            return None
    except OSError as error:
        return f"{error.strerror or error} (needs root: CAP_SYS_ADMIN and CAP_NET_ADMIN)"


def make_namespace(window: int = WINDOW) -> int:
    """A descriptor of a new network namespace, which is there as long as something holds it. Raises OSError."""
    with inside(None):
        for name, value in {**SETTINGS, "ipv4/tcp_rmem": f"4096 {window} {window}"}.items():
            if (setting := Path("/proc/sys/net") / name).exists():
                setting.write_text(value)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


@contextmanager
def inside(path: str | None) -> Iterator[None]:
    """This thread, and what it starts, in the network namespace at ``path``; None: in a new one. Raises OSError."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if path is None:
            _system("unshare", CLONE_NEWNET)
        else:
            enter(path)
        try:
            yield
        finally:
            _system("setns", own, CLONE_NEWNET)
    finally:
        os.close(own)


def enter(path: str) -> None:
    """Moves this thread into the network namespace at ``path``. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _system("setns", descriptor, CLONE_NEWNET)
    finally:
        os.close(descriptor)


def _system(name: str, *args: int) -> None:
    """A call of the C library that Python 3.11 does not have."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        code = ctypes.get_errno()
        raise OSError(code, f"{name} of a network namespace: {os.strerror(code)}")


def command(program: str, *lines: str) -> None:
    """Has `ip` or `tc` do ``lines``, in the namespace of this thread. Raises OSError."""
    done = subprocess.run([program, "-batch", "-"], input="\n".join(lines) + "\n", text=True, capture_output=True)
    if done.returncode:
        raise OSError(f"`{program}`: {' '.join(done.stderr.split())}")


def _serve(path: str, channel: Connection, function: Callable[..., Any], *args: Any) -> None:
    """A rank's life. All its threads and sockets are made after it has entered its namespace."""
    try:
        enter(path)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        os.environ["GLOO_SOCKET_IFNAME"] = "wire"
        channel.send((function(*args), None))
    except BaseException:
        channel.send((None, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _collect(channels: list[Connection]) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(channels):
        ready = wait([channel for rank, channel in enumerate(channels) if rank not in values])
        answers = {channels.index(channel): _receive(channel) for channel in ready}  # type: ignore[arg-type]
        failed = {rank: error for rank, (_, error) in answers.items() if error is not None}
        if failed:
            # First one that ended without a word: what others say came of that.
            rank = min(failed, key=lambda rank: failed[rank] != SILENT)
            raise RankError(f"rank {rank} of {len(channels)} failed:\n{failed[rank]}")
        values |= {rank: value for rank, (value, _) in answers.items()}
    return [values[rank] for rank in range(len(channels))]


def _receive(channel: Connection) -> tuple[Any, str | None]:
    try:
        return channel.recv()
    except EOFError:
        return None, SILENT


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import_module("benchmarks.gloo").main()
