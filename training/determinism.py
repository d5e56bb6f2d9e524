"""Where a run computes, in which dtype, on how many threads, and how far its bits repeat.

A sum's bits depend on the order of its terms, and on a CPU that order depends on the number of threads. Launchers each
hand out their own count, so the program sets it, from ``run.threads``, and records it. On an accelerator
``run.deterministic`` turns torch's deterministic mode on; the bits then repeat on the same kind of machine.
"""

import os
from pathlib import Path

import torch

from model.fp8 import DEEPSEEK_V3, MXFP8
from model.precision import Numerics
from training.config import Device, Precision

NUMERICS = {
    Precision.bf16: Numerics(torch.bfloat16),
    Precision.fp8: Numerics(torch.bfloat16, DEEPSEEK_V3),
    Precision.mxfp8: Numerics(torch.bfloat16, MXFP8),
    Precision.fp32: Numerics(torch.float32),
    Precision.fp64: Numerics(torch.float64),
}


def choose_device(device: Device) -> torch.device:
    """The device that ``run.device`` names. ValueError where torch finds none of that kind."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if device is Device.auto:
        return found or torch.device("cpu")
    if device is not Device.cpu and (found is None or found.type != device.value):
        raise ValueError(f"run.device={device}: torch {torch.__version__} finds no such device here; use auto or cpu")
    return torch.device(device.value)


def name_device(device: torch.device) -> str:
    """What the device calls itself; "cpu" for the processor."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def count_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fix_numerics(device: torch.device, threads: int | None, deterministic: bool = True) -> int:
    """Sets threads (None: all cores) and deterministic mode for the whole process; returns the number of threads."""
    threads = threads or count_cores()
    torch.set_num_threads(threads)
    deterministic = deterministic and device.type != "cpu"  # what our models use on a CPU is
    if deterministic:
        # Read when the first product of the process sets its library up.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # loads torch's compiler
    # The mode would also fill every new tensor with NaN, which costs a pass and changes no result of ours.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return threads


def measure_peak_memory(device: torch.device) -> int:
    """The most bytes held so far: of the device's memory or, on a CPU, of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: of the device's memory or, on a CPU, of the machine's."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).mem_get_info()[0])
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        line = next(line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
