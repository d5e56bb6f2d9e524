"""Every check that there is, as a table: name, rule, how a value is written, and what to do where it fails.

The rules are in launcher/preflight/judge.py; who measures what, in measure.py and network.py beside it.
"""

from collections.abc import Iterator
from typing import NamedTuple

from configs.preflight import PreflightConfig
from configs.schema import TrainConfig
from launcher.preflight.judge import (
    Check,
    Rule,
    anything,
    at_least,
    equal,
    like_the_best,
    near,
    nothing,
    together,
    within,
)
from launcher.preflight.network import INSIDE
from model.count import count

DISK = 4.0  # a disk that machines share serves some of them first
STATE = 12  # bytes of a parameter's master and moments
FEW = 1024  # files that a rank of a few has open at most
SHARED = 64 * 2**20  # bytes of shared memory that a collective library takes for a rank
# Microseconds that a short message may take longer than twice what its peers take: by a processor, and by a device.
LATE, DEVICE_LATE = 2000.0, 200.0
MARGIN = 3.0  # degrees below which a device slows itself down

RESET = "reset the device (nvidia-smi --gpu-reset) or reboot the machine; if it comes again, have the device replaced"
COOL = "look at its fans, its cooling and what else runs in its rack"


class Needs(NamedTuple):
    """What a run asks of a machine."""

    memory: float  # GB
    shared: float  # GB
    disk: float  # GB
    files: float
    devices: float


def find_needs(config: TrainConfig, world: int, here: int, accelerated: bool) -> Needs:
    """Of a machine with ``here`` of ``world`` ranks."""
    state = STATE * count(config.model).trained.total / 1e9
    share = state * here / world
    memory, kept = (0.0 if accelerated else 2 * share) + share, config.checkpoint.keep + 1
    near_copies = 6 * share if config.checkpoint.near_every and config.checkpoint.near_folder == "/dev/shm" else 0.0  # noqa: S108
    shared = here * SHARED / 1e9 if here > 1 else 0.0
    saves = config.checkpoint.minutes is not None or config.checkpoint.every > 0
    files = FEW + 16.0 * world
    return Needs(memory, shared + near_copies, state * kept if saves else 0.0, files, float(here) if accelerated else 0)


def list_checks(how: PreflightConfig, needs: Needs, versions: list[str], kind: str) -> list[Check]:
    """All of them. ``versions``: the checks that compare one; ``kind``: of the devices that are computed on."""
    return [
        *_of_devices(how, needs),
        *_of_machines(how, needs, versions),
        *_of_network(how, LATE if kind == "cpu" else DEVICE_LATE),
    ]


def _of_devices(how: PreflightConfig, needs: Needs) -> Iterator[Check]:
    yield Check(
        "devices",
        together(at_least(needs.devices), equal),
        "{:.0f}",
        "a device is missing: see nvidia-smi and dmesg (Xid 79)",
    )
    yield Check("device", nothing, "{}", "dmesg says why (Xid 79); reboot the machine, or have the device reseated")
    yield Check("uncorrected errors", nothing, "{} of its memory", RESET)
    yield Check("rows to be replaced", nothing, "a row of its memory is to be replaced at the next reset", RESET)
    yield Check(
        "rows not replaced", nothing, "no row of its memory was left to replace a bad one", "have the device replaced"
    )
    yield Check("margin of temperature", at_least(MARGIN), "{:.0f} C", COOL)
    yield Check(
        "slowed down", nothing, "by {}", f"{COOL}; a power brake or a hardware slowdown may be its power supply"
    )
    yield Check("power cap", nothing, "{}", "raise it (nvidia-smi -pl), or lower it everywhere")
    yield Check("highest clock", equal, "{} MHz", "clocks are locked, or devices differ: nvidia-smi -rgc")
    yield Check("highest memory clock", equal, "{} MHz", "clocks are locked, or devices differ: nvidia-smi -rmc")
    yield Check("clock", near(how.slow), "{:.0f} MHz", f"clocks are locked (nvidia-smi -rgc), or: {COOL}")
    yield Check(
        "links", like_the_best, "{:.0f} NVLinks up", "see nvidia-smi nvlink -s, the fabric manager, and dmesg (Xid 74)"
    )
    yield Check("generation of PCIe", like_the_best, "{}", "reseat the device; look at the BIOS and at risers")
    yield Check(
        "width of PCIe", nothing, "{}", "reseat the device; look at risers and at other cards that share its lanes"
    )
    yield Check("product", near(how.slow), "{:,.1f} GFLOP/s", "see what else runs there; clocks, cooling and power")


def _of_machines(how: PreflightConfig, needs: Needs, versions: list[str]) -> Iterator[Check]:
    rate: Rule = near(DISK * how.slow)
    if how.disk_megabytes is not None:
        rate = together(at_least(how.disk_megabytes), rate)
    yield Check("disk", rate, "{:,.0f} MB/s", "see who else writes there, and how it is mounted")
    yield Check("writing", nothing, "{}", "see checkpoint.folder, its permissions, its quota and its mount")
    yield Check(
        "free space", at_least(needs.disk), "{:,.1f} GB", "make room, lower checkpoint.keep, or set checkpoint.folder"
    )
    yield Check(
        "memory", at_least(needs.memory), "{:,.1f} GB", "end what else runs there, or spread state over more machines"
    )
    yield Check(
        "shared memory",
        at_least(needs.shared),
        "{:,.2f} GB",
        "make /dev/shm larger (of a container: --shm-size), or empty it",
    )
    yield Check(
        "open files",
        at_least(needs.files),
        "{:,.0f}",
        "raise it: ulimit -n, or LimitNOFILE of the daemon that starts jobs",
    )
    yield Check("clock of the machine", within(how.clock), "{:+.2f} s", "let chrony or ntpd set it")
    for name in versions:
        yield Check(name, equal, "{}", "install the same everywhere")


def _of_network(how: PreflightConfig, late: float) -> Iterator[Check]:
    cable = "look at its cable, switch port and errors (ethtool -S, ibstat), and at what else uses it"
    rate: Rule = near(how.slow)
    if how.link_gigabits is not None:
        rate = together(at_least(how.link_gigabits), rate)
    for name in ("sending", "receiving"):
        yield Check(name, rate, "{:,.2f} Gbit/s", cable)
    for axis in ("pp", "dp", "tp", "ep"):
        yield Check(f"bandwidth of {axis}{INSIDE}", anything, "{:,.0f} MB/s", "")
        yield Check(f"latency of {axis}{INSIDE}", anything, "{:,.0f} us", "")
        yield Check(f"bandwidth of {axis}", near(how.slow), "{:,.0f} MB/s", cable)
        yield Check(f"latency of {axis}", near(2.0, larger_is_better=False, slack=late), "{:,.0f} us", cable)
