"""The network that benchmarks measure on: made, shaped, talked over, and gone without a trace, killed or not.

It needs root and the kernel's leave. Where that is missing the tests are skipped with the reason; with
SHOESTRING_NETWORK=required, as in CI, they fail.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.network import Links, Network, RankError, can_make, inside, make_namespace
from parallel.mesh import connect, disconnect

ROOT = Path(__file__).parents[2]
SLOW, FAST = 20.0, 200.0  # Mbit/s
SIZE = 1_000_000  # bytes: 0.4 s on a slow link, 0.04 s on a fast one
CREDIT = 20_000  # bytes that a link lets through at once
LATE = 20  # seconds, on a machine however busy
REFUSED = """
import os
from benchmarks.network import can_make
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
print(can_make())
"""
HOLD = """
import os, sys, time
from pathlib import Path
from benchmarks.network import Network

def tell(rank, world, store, folder):
    (Path(folder) / str(rank)).write_text(str(os.getpid()))
    time.sleep(100)

if __name__ == "__main__":
    with Network(2, 100.0) as network:
        print(network.links.hub, *network.links.ranks, flush=True)
        network.run(tell, sys.argv[1])
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    started = time.monotonic()
    require()
    with Network(ranks=2, megabits=FAST) as made:
        assert time.monotonic() - started < 10
        yield made


def require() -> None:
    reason = can_make()
    if reason is not None and os.environ.get("SHOESTRING_NETWORK") == "required":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)


def look(rank: int, world: int, store: Path, value: int) -> tuple[int, int, set[str], str]:
    shown = subprocess.run(["ip", "-json", "address"], capture_output=True, check=True).stdout
    found = {link["ifname"]: [address["local"] for address in link["addr_info"]] for link in json.loads(shown)}
    return rank * value, world, set(found), *found["wire"]


def send_at_two_rates(rank: int, world: int, store: Path, links: Links) -> list[float]:
    """Seconds for a message of SIZE bytes before and after rank 0 has changed the rate."""
    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, world, store)
    seconds = []
    for rate in (FAST, SLOW):
        if rank == 0:
            links.shape(rate)
        dist.barrier()
        began = time.perf_counter()
        message = torch.full((SIZE,), 1 + rank, dtype=torch.uint8)
        (dist.recv if rank else dist.send)(message, 1 - rank)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        assert (message == 1).all()
    disconnect()
    return seconds


def fail_in_one(rank: int, world: int, store: Path, folder: str) -> None:
    (Path(folder) / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        while len(list(Path(folder).iterdir())) < world:
            time.sleep(0.01)
        raise KeyError("no such layer")
    time.sleep(100)


def die_in_one(rank: int, world: int, store: Path) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def read_pids(folder: Path) -> list[int]:
    return [int(text) for path in folder.iterdir() if (text := path.read_text())]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(true: Callable[[], bool]) -> bool:
    """Whether ``true()`` becomes true in time."""
    deadline = time.monotonic() + LATE
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return true()


def list_links(path: str) -> set[str]:
    with inside(path):
        shown = subprocess.run(["ip", "-json", "link"], capture_output=True, check=True).stdout
    return {link["ifname"] for link in json.loads(shown)} - {"lo"}


def test_ranks_see_their_link_alone(network: Network) -> None:
    assert network.run(look, 7) == [(0, 2, {"lo", "wire"}, "10.77.0.1"), (7, 2, {"lo", "wire"}, "10.77.0.2")]
    assert list_links(network.links.hub) == {"hub", "port0", "port1"}
    assert not list_links("/proc/self/ns/net") & {"hub", "port0", "port1", "wire"}


def test_a_message_takes_the_time_of_the_rate(network: Network) -> None:
    for fast, slow in network.run(send_at_two_rates, network.links):
        # At least that long is a fact; at most ten times as long, on a machine however busy.
        least = (SIZE - CREDIT) * 8e-6
        assert fast >= least / FAST and least / SLOW <= slow < 10 * SIZE * 8e-6 / SLOW


@pytest.mark.parametrize("rate", [0.5, 40_000, None, 12.5])
def test_both_ends_of_every_link_have_the_rate(network: Network, rate: float | None) -> None:
    network.shape(rate)
    hub, ranks = network.links
    for path, names in ((hub, ["port0", "port1"]), *((path, ["wire"]) for path in ranks)):
        with inside(path):
            shown = subprocess.run(["tc", "-json", "qdisc"], capture_output=True, check=True).stdout
        queues = {queue["dev"]: queue for queue in json.loads(shown) if queue["dev"] in names}
        assert [queues[name]["kind"] for name in names] == ["noqueue" if rate is None else "tbf"] * len(names)
        assert rate is None or [queues[name]["options"]["rate"] for name in names] == [rate * 125e3] * len(names)


def reach(network: Network) -> bool:
    """Whether rank 1 hears what rank 0 says, within a second."""
    with inside(network.links.ranks[1]):
        server = socket.create_server(("10.77.0.2", 7000))
    with inside(network.links.ranks[0]), server:
        try:
            socket.create_connection(("10.77.0.2", 7000), timeout=1).close()
            return True
        except TimeoutError:
            return False


def test_a_rank_is_unplugged_and_plugged_in(network: Network) -> None:
    assert reach(network)
    network.plug(1, False)
    assert not reach(network)
    network.plug(1, True)
    assert until(lambda: reach(network))


def test_a_renewed_rank_keeps_its_place_and_nothing_else(network: Network) -> None:
    assert reach(network)
    with inside(network.links.ranks[1]):
        was = os.readlink("/proc/thread-self/ns/net")
        subprocess.run(["ip", "link", "add", "left", "type", "veth", "peer", "name", "right"], check=True)
    network.renew(1)
    with inside(network.links.ranks[1]):
        assert os.readlink("/proc/thread-self/ns/net") != was
    assert list_links(network.links.ranks[1]) == {"wire"} and until(lambda: reach(network))
    assert list_links(network.links.hub) == {"hub", "port0", "port1"}
    assert network.run(look, 7)[1][2:] == ({"lo", "wire"}, "10.77.0.2")


def test_the_first_exception_ends_all_ranks_and_is_told(network: Network, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"^rank 1 of 2 failed:\nTraceback") as error:
        network.run(fail_in_one, str(tmp_path))
    assert "in fail_in_one" in str(error.value) and "KeyError: 'no such layer'" in str(error.value)
    assert len(pids := read_pids(tmp_path)) == 2 and not any(map(alive, pids))
    with pytest.raises(RankError, match=r"rank 1 of 2 failed:\nended without an answer"):
        network.run(die_in_one)


def test_killing_the_process_leaves_nothing(network: Network, tmp_path: Path) -> None:
    """A witness link joins each of its namespaces to one of ours: it goes when the kernel removes the other end."""
    script, folder = tmp_path / "hold.py", tmp_path / "pids"
    script.write_text(HOLD)
    folder.mkdir()
    command, environment = [sys.executable, script, folder], os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    own = make_namespace()
    try:
        assert holder.stdout is not None
        paths = holder.stdout.readline().split()
        with inside(here := f"/proc/self/fd/{own}"):
            for number, path in enumerate(paths):
                words = f"link add witness{number} type veth peer name seen netns {path}".split()
                subprocess.run(["ip", *words], check=True)
        assert until(lambda: len(read_pids(folder)) == 2)
        assert len(list_links(here)) == 3
        holder.kill()
        holder.wait()
        assert until(lambda: not any(map(alive, read_pids(folder))))
        assert until(lambda: not list_links(here))
    finally:
        holder.kill()
        holder.communicate()
        os.close(own)


@pytest.mark.parametrize("ranks", [0, -1, 129])
def test_a_bad_number_of_ranks_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=f"ranks={ranks} must be from 1 to 128"):
        Network(ranks, 100.0)


@pytest.mark.parametrize("rate", [0.0, -5.0, float("nan"), float("inf"), 0.01])
def test_a_bad_rate_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"megabits={rate} must be a rate in Mbit/s, at least 0.1"):
        Network(2, rate)
    with pytest.raises(ValueError, match="megabits="):
        Links("", ()).shape(rate)


def test_it_says_why_there_can_be_none() -> None:
    """Without root, where there are namespaces; where there are none, or no iproute2, that is said instead."""
    said = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.search("needs root|install iproute2|thing of Linux", said.stdout), said
