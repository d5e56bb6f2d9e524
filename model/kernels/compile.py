"""Compiles kernels ahead of time, without a device, and reads from what comes out what they need of one.

The entry points are called as training calls them, on tensors of the meta device, so that what is compiled is what a
launch would compile. Only the driver is stood in for: it names a target, takes the binary and launches nothing.
Registers and spills of a cubin are read with the cuobjdump that Triton ships, those of an hsaco from the metadata in
its assembly; shared memory is what Triton asks for.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from model.kernels.chips import CHIPS, Unit, Work


class Case(NamedTuple):
    """A kernel in one configuration, with a call of its entry point on a large model's shapes."""

    name: str
    kernel: Any
    call: Callable[[], Any]
    operations: float
    read: Any  # tensors, or a number of bytes
    unit: Unit = Unit.fp32
    configuration: str = ""
    shipped: bool = True  # or one that benchmarks/gpu.py tries

    def work(self, made: Any) -> Work:
        """What ``call`` has to do at least, if it gives ``made``."""
        return Work(self.operations, count_bytes(self.read) + count_bytes(made), self.unit)


def count_bytes(tensors: Any) -> int:
    """Of a tensor, of a tuple of such, or a number of bytes."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, tuple):
        return sum(map(count_bytes, tensors))
    return tensors if isinstance(tensors, int) else 0


class Compiled(NamedTuple):
    """A case for a target."""

    case: Case
    work: Work
    target: str
    registers: int  # a thread's; vector and accumulation registers together on AMD
    spills: int  # NVIDIA: bytes of a thread's stack and local memory; AMD: registers spilled
    shared: int  # bytes a program
    warps: int
    text: str  # PTX or AMD assembly
    binary: bytes

    @property
    def occupancy(self) -> float:
        return CHIPS[self.target].occupancy(self.registers, self.shared, self.warps)

    @property
    def instruction(self) -> str:
        """Of the matrix units, as far as its kind goes; empty if there is none."""
        found = re.search(CHIPS[self.target].instruction.get(self.case.unit, "(?!)"), self.text)
        return found[0] if found else ""

    def faults(self) -> list[str]:
        """Why this must not be shipped."""
        chip, unit = CHIPS[self.target], self.case.unit
        faults = [f"spills {self.spills}"] if self.spills else []
        if self.shared > chip.shared:
            faults.append(f"wants {self.shared} bytes of shared memory, and {chip.name} has {chip.shared}")
        if unit in chip.instruction and not self.instruction:
            faults.append(f"does not use the matrix units for {unit}")
        return faults


def compile_cases(target: str, cases: list[Case]) -> Iterator[Compiled]:
    """Each of ``cases`` for ``target``, a key of CHIPS.

    The process keeps the driver that launches nothing: it is no place to run kernels afterwards.
    """
    driver.set_active(_NoDevice(CHIPS[target].target, CHIPS[target].shared))
    for case in cases:
        case.kernel.device_caches.clear()  # of another target or case
        work = case.work(case.call())
        ((made,),) = [list(cache[0].values()) for cache in case.kernel.device_caches.values()]
        yield _measure(case, work, target, made)


class _NoDevice(DriverBase):
    """Stands in for a driver while kernels are compiled."""

    def __init__(self, target: GPUTarget, shared: int) -> None:
        self._target, self._shared = target, shared
        self.utils = self

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What a program may have of shared memory."""
        return {"max_shared_mem": self._shared}

    def load_binary(self, *args: object) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None


def _measure(case: Case, work: Work, target: str, made: Any) -> Compiled:
    text, binary = made.asm.get("ptx") or made.asm["amdgcn"], made.kernel
    registers, spills = _read_cubin(binary) if "ptx" in made.asm else _read_metadata(text)
    return Compiled(case, work, target, registers, spills, made.metadata.shared, made.metadata.num_warps, text, binary)


def _read_cubin(binary: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)  # noqa: S603
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", said.stdout)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def _read_metadata(text: str) -> tuple[int, int]:
    found = {key: int(value) for key, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
    return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]
