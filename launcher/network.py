"""Addresses: by which one other machines reach this one, which interface has it, and a store that listens there alone.

find_address(["n2", "n3"])  ->  10.1.0.1      the source of what is sent to them
find_interface("10.1.0.1")  ->  eth2          whose traffic goes there: what gloo and NCCL are to use
listen("10.1.0.1")          ->  a TCPStore    at a port that the system chose
"""

import socket
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import TCPStore

HERE = "127.0.0.1"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"  # the interface of ranks that stay on one machine
SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the address of an interface


def find_address(others: Iterable[str]) -> str:
    """The address of this machine that ``others``, names of machines, reach; loopback without any.

    Raises ValueError where none of them can be reached by any name.
    """
    names = list(others)
    for name in names:
        with suppress(OSError):
            return find_source(name)
    if names:
        raise ValueError(
            f"cluster.interface: none of the machines {', '.join(names[:4])} has a name with an address here: name the "
            "interface that leads to them"
        )
    return HERE


def find_interface(host: str) -> str | None:
    """The interface by which ``host`` is reached; None where that cannot be told."""
    try:
        source = find_source(host)
    except OSError:
        return None
    if source.startswith("127."):
        return LOOPBACK
    return next((name for _, name in socket.if_nameindex() if read_address(name) == source), None)


def read_address(interface: str) -> str | None:
    """The address of an interface of this machine; None where it has none, or is not there."""
    if not sys.platform.startswith("linux"):
        return None
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked, suppress(OSError):
        answer = fcntl.ioctl(asked, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return None


def listen(address: str) -> "TCPStore":
    """A store where ranks meet. One that torch opens by itself would listen on every address of this machine."""
    from torch.distributed import TCPStore

    with socket.socket() as bound:
        bound.bind((address, 0))
        bound.listen(1024)
        port = bound.getsockname()[1]
        # Several tenants: torch's elastic agent, which opens a store at this address and port, gets this one.
        return TCPStore(
            address,
            port,
            is_master=True,
            multi_tenant=True,
            wait_for_workers=False,
            master_listen_fd=bound.detach(),
        )


def find_source(host: str) -> str:
    """The address that what is sent to ``host`` comes from: nothing is sent. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect((host, 9))
        return str(towards.getsockname()[0])
