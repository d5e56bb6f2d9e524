"""Compiles every kernel ahead of time, without a device, and prints what it needs of one.

    python -m parallel.kernels.compile [cuda:90 cuda:100 hip:gfx942]

The entry points are called as a rank would call them, in shapes of a 7168-wide model, on tensors of the meta device, so
that what is compiled is what a launch would compile. Only the driver is stood in for: it names a target, takes
the binary and launches nothing. Registers and spills of a cubin are read with the cuobjdump that Triton ships, those of
an hsaco from the metadata in its assembly; shared memory is what Triton asks for.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from parallel.kernels import dispatch, flags, gather_gemm, gemm_scatter
from parallel.kernels.tile import AMD, Tile

TARGETS = {
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
RANKS, ROWS, WIDTH, FFN, CHUNKS, PROGRAMS = 8, 4096, 7168, 2048, 4, 124


class Compiled(NamedTuple):
    """A kernel for a target."""

    kernel: str
    target: str
    registers: int  # a thread's; vector and accumulation registers together on AMD
    spills: int  # NVIDIA: bytes of a thread's stack and local memory; AMD: registers spilled
    shared: int  # bytes a program
    text: str  # PTX or AMD assembly
    binary: bytes


def compile_kernels(target: str, names: tuple[str, ...] = ()) -> list[Compiled]:
    """Every kernel, or those of ``names``, for ``target``, a key of TARGETS.

    The process keeps the driver that launches nothing: it is no place to run kernels afterwards.
    """
    driver.set_active(_NoDevice(TARGETS[target]))
    compiled = []
    for name, (kernel, call) in calls(target).items():
        if not names or name in names:
            kernel.device_caches.clear()  # of another target
            call()
            ((made,),) = [list(cache[0].values()) for cache in kernel.device_caches.values()]
            compiled.append(_measure(name, target, made))
    return compiled


def calls(target: str) -> dict[str, tuple[Any, Callable[[], object]]]:
    """Every kernel, with a call of its entry point."""
    tile = AMD if target.startswith("hip") else Tile()
    table, ready = _meta(RANKS, dtype=torch.int64), _meta(RANKS, dtype=torch.int32)
    chunk_flags, gathered = _meta(RANKS, CHUNKS, dtype=torch.int32), _meta(RANKS, ROWS, WIDTH)
    x, up, down = _meta(RANKS, ROWS, FFN), _meta(FFN, WIDTH), _meta(WIDTH, FFN)
    slots, tokens, rows = _meta(RANKS, ROWS, WIDTH), _meta(ROWS, WIDTH), _rows()
    tables = gemm_scatter.Tables(table, table, CHUNKS)
    return {
        "gather_matmul": (
            gather_gemm._gather_matmul,
            lambda: gather_gemm.gather_matmul(gathered, chunk_flags, up, 3, PROGRAMS, tile),
        ),
        "matmul_scatter": (
            gemm_scatter._matmul_scatter,
            lambda: gemm_scatter.matmul_scatter(x, down, tables, 3, PROGRAMS, tile),
        ),
        "sum_slots": (gemm_scatter._sum_slots, lambda: gemm_scatter.sum_slots(slots, chunk_flags, PROGRAMS)),
        "dispatch": (
            dispatch._dispatch,
            lambda: dispatch.dispatch(tokens, rows, table, table, (3, PROGRAMS)),
        ),
        "combine": (dispatch._combine, lambda: dispatch.combine(tokens, rows, table, ready, PROGRAMS)),
        "announce": (flags._announce, lambda: flags.announce(table, 3)),
        "mark": (flags._mark, lambda: flags.mark(chunk_flags, 3)),
        "await_flags": (flags._await, lambda: flags.await_flags(ready, ready)),
    }


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows() -> dispatch.Rows:
    sent, of_ranks = 4 * ROWS, _meta(RANKS, dtype=torch.int32)
    source, of_copies = _meta(sent, dtype=torch.int64), _meta(sent, dtype=torch.int32)
    starts = _meta(ROWS, dtype=torch.int64)
    return dispatch.Rows(source, of_ranks, of_ranks, of_ranks, of_copies, of_copies, starts)


class _NoDevice(DriverBase):
    """Stands in for a driver while kernels are compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target
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
        """What a program may have of shared memory: H100 and B200, MI300X."""
        return {"max_shared_mem": 65536 if self._target.backend == "hip" else 232448}

    def load_binary(self, *args: object) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return lambda *args: None


def _measure(name: str, target: str, made: Any) -> Compiled:
    text, binary = made.asm.get("ptx") or made.asm["amdgcn"], made.kernel
    registers, spills = _read_cubin(binary) if "ptx" in made.asm else _read_metadata(text)
    return Compiled(name, target, registers, spills, made.metadata.shared, text, binary)


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


def table(compiled: list[Compiled]) -> str:
    """As text, a line for each."""
    lines = [f"{'kernel':16}{'target':12}{'registers':>10}{'spills':>8}{'shared bytes':>14}"]
    lines += [f"{c.kernel:16}{c.target:12}{c.registers:10}{c.spills:8}{c.shared:14}" for c in compiled]
    return "\n".join(lines)


def main(targets: list[str]) -> int:
    """Prints the table for ``targets``, or for all."""
    if unknown := sorted(set(targets) - TARGETS.keys()):
        print(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    print(f"Triton {triton.__version__}")
    print(table([compiled for target in targets or TARGETS for compiled in compile_kernels(target)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
