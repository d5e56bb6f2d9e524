"""What a machine, and each of its ranks, says of itself: name of the check, of what, and the value.

A disk or a device that fails while it is measured is a finding, not the end: the value is then the reason, in words.
"""

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.preflight.desk import Desk
from launcher.preflight.judge import Value
from launcher.versions import versions
from training.nvml import Device, Nvml, find_visible, open_nvml

if TYPE_CHECKING:
    import torch

Row = tuple[str, str, Value]  # check, subject, value
MIB, GB = 2**20, 1e9
WRITTEN, LONGEST = 64 * MIB, 0.4  # bytes that a disk is tried with, and seconds after which no more are
CPU_SIZE, DEVICE_SIZE = 384, 4096  # rows of a matrix
SPELL = 0.25  # seconds of products
TRIPS = 5  # round trips, of which the shortest tells the time


def read_machine(folder: Path | None, shared: str = "/dev/shm") -> Iterator[Row]:  # noqa: S108
    """Of the machine, by the first of its ranks. ``folder`` gets the checkpoints; None: they go elsewhere."""
    yield "open files", "", float(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    yield "memory", "", read_free_memory() / GB
    if os.path.isdir(shared):
        yield "shared memory", "", _measure_free(shared) / GB
    known = versions()
    packages, git = known["packages"], known["git"]
    assert isinstance(packages, dict)
    named = {"python": known["python"], **packages, "sources": git["revision"] if isinstance(git, dict) else None}
    for name, version in named.items():
        yield f"version of {name}", "", version if version is None else str(version)
    if folder is not None:
        yield from read_disk(folder)


def read_disk(folder: Path) -> Iterator[Row]:
    """Room and write rate where ``folder`` is. Nothing is left there, however this ends."""
    path = folder / f".preflight-{os.uname().nodename}-{os.getpid()}"
    try:
        yield "free space", "", _measure_free(str(folder)) / GB
        # A page of random bytes: a disk that compresses is to write as much as it is given.
        content = memoryview(os.urandom(MIB) * 4)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            path.unlink()
            written, started = 0, time.monotonic()
            while written < WRITTEN and time.monotonic() - started < LONGEST:
                written += os.write(file, content)
            os.fsync(file)
            yield "disk", "", written / 1e6 / (time.monotonic() - started)
        finally:
            os.close(file)
    except OSError as error:
        yield "writing", "", f"{error.strerror} in {folder}"


def read_free_memory() -> int:
    """Bytes that processes of this machine, or of its container, can still be given."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        return min(free, most - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        return free


def _measure_free(path: str) -> int:
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def read_devices(desk: Desk, nvml: Nvml | None) -> Iterator[Row]:
    """Of the devices that this rank may use, and that no other rank of its machine tells of."""
    if nvml is None:
        return
    if desk.leads:
        yield "version of driver", "", nvml.driver
        yield "version of NVML", "", nvml.version
    seen = find_visible(os.environ, [nvml.read(index) for index in range(nvml.count)])
    # A scheduler may show each rank its own device alone: then none of them can count.
    if desk.leads and (len(seen) != 1 or desk.here == 1):
        yield "devices", "", float(len(seen))
    if not desk.leads and len(seen) != 1:
        return  # all ranks see the same ones: the first tells of them
    for device in seen:
        yield from describe_device(device)


def describe_device(device: Device) -> Iterator[Row]:
    """What is judged of a device."""
    name = f"device {device.index}"
    yield "device", name, device.fault
    if device.fault:
        return
    yield "uncorrected errors", name, device.ecc_volatile
    yield "rows to be replaced", name, device.remap_pending
    yield "rows not replaced", name, device.remap_failed
    if device.temperature is not None and device.slowdown_temperature is not None:
        yield "margin of temperature", name, float(device.slowdown_temperature - device.temperature)
    if device.throttles is not None:
        yield "slowed down", name, ", ".join(words for words in device.throttles if words in SLOWED)
    if device.cap_watts is not None and device.default_cap_watts is not None:
        lower = device.cap_watts < device.default_cap_watts
        yield "power cap", name, f"{device.cap_watts:.0f} of {device.default_cap_watts:.0f} W" if lower else ""
    yield "highest clock", name, device.sm_mhz_most
    yield "highest memory clock", name, device.memory_mhz_most
    yield "clock", name, device.sm_mhz
    if device.links is not None:
        yield "links", name, float(sum(device.links))
    yield "generation of PCIe", name, device.pcie_generation
    if device.pcie_width is not None and device.pcie_width_most is not None:
        lacking = device.pcie_width < device.pcie_width_most
        yield "width of PCIe", name, f"x{device.pcie_width} of x{device.pcie_width_most}" if lacking else ""


# What slows a device down that works: to be at its default power cap, or idle, is no fault.
SLOWED = (
    "hardware slowdown",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "hardware power brake",
    "board limit",
    "low reliability voltage",
)


def read_product(desk: Desk, device: "torch.device", threads: int | None) -> tuple[float, list[Row]]:
    """How fast this rank multiplies matrices, in GFLOP/s, and, while it does, what its device says.

    On an accelerator products go on while the library is asked: at rest a device lowers clocks and links.
    """
    import torch

    size = CPU_SIZE if device.type == "cpu" else DEVICE_SIZE
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        seconds = _time_product(a, b)
        with open_nvml() as nvml:
            if device.type != "cpu":
                for _ in range(int(SPELL / seconds)):
                    torch.mm(a, b)
            rows = list(read_devices(desk, nvml))
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / seconds / 1e9, rows


def _time_product(a: "torch.Tensor", b: "torch.Tensor") -> float:
    """Seconds of a product, the median of those of a spell."""
    import torch

    wait = (lambda: None) if a.device.type == "cpu" else torch.accelerator.synchronize
    torch.mm(a, b)
    wait()
    times: list[float] = []
    started = now = time.perf_counter()
    while now - started < SPELL or len(times) < 3:
        torch.mm(a, b)
        wait()
        times.append(time.perf_counter() - now)
        now = time.perf_counter()
    return sorted(times)[len(times) // 2]


def read_clock(desk: Desk, leaders: list[int]) -> Iterator[Row]:
    """How far this machine's clock is from rank 0's: by its answer halfway of the shortest of some round trips."""
    if desk.rank == 0:
        for leader in leaders[1:]:
            for trip in range(TRIPS):
                desk.store.wait([f"asked by {leader}, {trip}"])
                desk.store.set(f"told {leader}, {trip}", repr(time.time()))
        yield "clock of the machine", "", 0.0
    elif desk.leads:
        best = (float("inf"), 0.0)
        for trip in range(TRIPS):
            asked = time.time()
            desk.store.set(f"asked by {desk.rank}, {trip}", "yes")
            theirs = float(desk.store.get(f"told {desk.rank}, {trip}"))
            heard = time.time()
            best = min(best, (heard - asked, (asked + heard) / 2 - theirs))
        yield "clock of the machine", "", best[1]
