"""What makes a process a rank: its cores, what it talks over, what is said of it in its environment."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from unittest.mock import patch

import pytest
from torch.distributed import HashStore

from configs.network import INTERFACE, VARIABLES, NetworkConfig
from launcher.cores import divide, read_domains, share_cores
from launcher.discover import Backend, Rank
from launcher.entry import enter
from launcher.network import HERE, LOOPBACK, find_address, find_interface, listen, read_address
from training.config import Affinity

TWO_SOCKETS = {core: core // 4 % 2 for core in range(16)}  # 0-3 and 8-11 are the first one's, as with hyperthreads


def test_ranks_that_may_use_the_same_cores_share_them_by_domain() -> None:
    everybody = dict.fromkeys(range(4), range(16))
    shares = [divide(everybody, local, TWO_SOCKETS) for local in range(4)]
    assert shares == [[0, 1, 2, 3], [8, 9, 10, 11], [4, 5, 6, 7], [12, 13, 14, 15]]
    assert [divide(dict.fromkeys(range(2), range(16)), local, TWO_SOCKETS) for local in range(2)] == [
        [0, 1, 2, 3, 8, 9, 10, 11],
        [4, 5, 6, 7, 12, 13, 14, 15],
    ]


def test_a_rank_that_has_cores_of_its_own_keeps_them() -> None:
    """Slurm's task plugin and mpirun bind each one by themselves."""
    assert divide({0: [0, 1], 1: [2, 3]}, 1, TWO_SOCKETS) == [2, 3]
    assert divide({0: [0, 1, 2, 3], 1: [0, 1, 2, 3], 2: [7]}, 1, TWO_SOCKETS) == [2, 3]


def test_every_core_is_somebody_s_and_nobody_is_without_one() -> None:
    random = Random(0)  # noqa: S311
    for _ in range(200):
        cores = random.sample(range(64), random.randint(1, 40))
        here = dict.fromkeys(range(random.randint(1, 12)), cores)
        shares = [divide(here, local, TWO_SOCKETS) for local in here]
        assert all(shares)
        if len(cores) >= len(here):
            assert sorted(core for share in shares for core in share) == sorted(cores)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_domains_are_as_linux_lists_them(tmp_path: Path) -> None:
    for node, text in (("node0", "0-3,8-9\n"), ("node1", "4-7\n"), ("node2", "\n")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(text)
    assert read_domains(tmp_path) == {0: 0, 1: 0, 2: 0, 3: 0, 8: 0, 9: 0, 4: 1, 5: 1, 6: 1, 7: 1}


@pytest.mark.parametrize("affinity", [Affinity.on, Affinity.off])
def test_affinity_is_set_where_it_is_asked_for(affinity: Affinity) -> None:
    """Two ranks of one machine, the other one's word given beforehand."""
    before = os.sched_getaffinity(0)
    store = HashStore()
    store.set("cores 1", f"[0, 1, {sorted(before)}]")
    try:
        mine = share_cores(store, Rank(0, 2, 0, 2), affinity)
        assert mine == max(1, len(before) // 2)
        assert len(os.sched_getaffinity(0)) == (mine if affinity is Affinity.on else len(before))
    finally:
        os.sched_setaffinity(0, before)


def test_each_key_of_the_network_is_a_variable() -> None:
    found = NetworkConfig(interface="eth2", ib_gid_index=3, nccl_algorithm="Ring", trace=0).variables()
    assert found == {
        "GLOO_SOCKET_IFNAME": "eth2",
        "NCCL_SOCKET_IFNAME": "eth2",
        "NCCL_IB_GID_INDEX": "3",
        "NCCL_ALGO": "Ring",
        "TORCH_FR_BUFFER_SIZE": "0",
    }
    assert set(VARIABLES) == set(NetworkConfig.__dataclass_fields__)
    with pytest.raises(ValueError, match=r"network.nccl_debug=a b must be letters"):
        NetworkConfig(nccl_debug="a b")
    with pytest.raises(ValueError, match=r"network.ib_timeout=-1 must not be negative"):
        NetworkConfig(ib_timeout=-1)


@pytest.fixture
def own_process() -> Iterator[None]:
    """What entering changes of this process is put back: its environment, and the signals that it holds."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with patch.dict(os.environ):
        yield
    signal.pthread_sigmask(signal.SIG_SETMASK, held)


@pytest.mark.usefixtures("own_process")
def test_a_rank_says_who_it_is_as_torchrun_would() -> None:
    for name in (*INTERFACE, "RANK", "MASTER_ADDR"):
        os.environ.pop(name, None)
    rank = Rank(1, 2, 1, 2, node=0, address=f"{HERE}:4711", backend=Backend.torchrun)
    with enter(rank, NetworkConfig()) as entered:
        assert entered == rank and os.environ["RANK"] == "1" and os.environ["MASTER_ADDR"] == HERE
        assert os.environ["GLOO_SOCKET_IFNAME"] == LOOPBACK


def test_addresses_are_those_that_lead_somewhere() -> None:
    assert find_address([]) == HERE == find_address(["localhost"])
    assert find_interface(HERE) == LOOPBACK and find_interface("no.such.host.invalid") is None
    assert read_address(LOOPBACK) == HERE and read_address("nothing0") is None
    with pytest.raises(ValueError, match=r"none of the machines no\.such\.host\.invalid has a name with an address"):
        find_address(["no.such.host.invalid"])


def test_a_store_listens_where_it_is_told_alone() -> None:
    store = listen(HERE)
    with socket.create_connection((HERE, store.port), 5):
        pass
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
    (address,) = {text.partition(":")[0] for text in listening if int(text.partition(":")[2], 16) == store.port}
    assert address == "0100007F"


BUSY = """
import sys, threading, time
from datetime import timedelta
from torch.distributed import HashStore
from launcher.entry import leave

def ask():
    while True:
        try:
            store.wait(["what nobody says"], timedelta(milliseconds=1))
        except Exception:
            pass

store = HashStore()
for _ in range(8):
    threading.Thread(target=ask, daemon=True).start()
time.sleep(0.1)
print("done", end="")
"""


def test_a_rank_ends_while_a_thread_of_its_comes_back_from_others() -> None:
    """With sys.exit, CPython up to 3.13 ends that thread where C++ does not allow it, and the process by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", BUSY + "leave(7)"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (7, "done"), done.stderr
