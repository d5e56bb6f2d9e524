"""The chips that kernels are compiled for: what a program may use, what that leaves for others, how fast at best.

    occupancy    warps that are on a multiprocessor at once / most that fit, by registers, shared memory and warps
    roofline     time >= max(operations / peak rate, bytes / bandwidth)      (Williams et al., CACM 52(4), 2009)

Rates are those of the makers' data sheets, without sparsity: H100 SXM5, B200 (a GPU of HGX B200), MI300X. No program
reaches them.
"""

from enum import StrEnum
from typing import NamedTuple

from triton.backends.compiler import GPUTarget


class Unit(StrEnum):
    """What computes."""

    fp8 = "fp8"  # matrix units
    bf16 = "bf16"  # matrix units
    fp32 = "fp32"  # everything else


class Chip(NamedTuple):
    """A target, limits of one multiprocessor, and peak rates."""

    name: str
    target: GPUTarget
    instruction: dict[Unit, str]  # of the matrix units, as their assembly begins
    shared: int  # bytes a program may have
    shared_of_all: int  # bytes a multiprocessor has
    shared_lost: int  # of these, a program's share for the driver
    registers: int  # of 32 bits and a lane, that the warps of a scheduler divide
    granule: int  # registers come in so many
    schedulers: int
    warps: int  # of a scheduler at most
    rates: dict[Unit, float]  # operations a second
    bandwidth: float  # bytes a second

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """Of a program of ``warps`` warps, ``registers`` a lane and ``shared`` bytes: an estimate, 0 to 1."""
        most = self.warps * self.schedulers
        rounded = -(-max(registers, 1) // self.granule) * self.granule
        by_registers = min(self.registers // rounded, self.warps) * self.schedulers // warps
        by_shared = self.shared_of_all // (shared + self.shared_lost) if shared + self.shared_lost else most
        return min(by_registers, by_shared, most // warps) * warps / most


_HOPPER = Chip(
    "H100",
    GPUTarget("cuda", 90, 32),
    {Unit.fp8: r"wgmma\.mma_async\S*e4m3\.e4m3", Unit.bf16: r"wgmma\.mma_async\S*bf16\.bf16"},
    shared=232448,
    shared_of_all=233472,
    shared_lost=1024,
    registers=512,
    granule=8,
    schedulers=4,
    warps=16,
    rates={Unit.fp8: 1979e12, Unit.bf16: 989e12, Unit.fp32: 67e12},
    bandwidth=3.35e12,
)
CHIPS = {
    "cuda:90": _HOPPER,
    "cuda:100": _HOPPER._replace(  # the same limits of a multiprocessor
        name="B200",
        target=GPUTarget("cuda", 100, 32),
        instruction={Unit.fp8: r"tcgen05\.mma\S*f8f6f4", Unit.bf16: r"tcgen05\.mma\S*kind::f16"},
        rates={Unit.fp8: 4500e12, Unit.bf16: 2250e12, Unit.fp32: 80e12},
        bandwidth=8.0e12,
    ),
    "hip:gfx942": Chip(
        "MI300X",
        GPUTarget("hip", "gfx942", 64),
        {Unit.fp8: r"v_mfma_f32_\S*fp8_fp8", Unit.bf16: r"v_mfma_f32_\S*bf16"},
        shared=65536,
        shared_of_all=65536,
        shared_lost=0,
        registers=512,
        granule=8,
        schedulers=4,
        warps=8,
        rates={Unit.fp8: 2615e12, Unit.bf16: 1307e12, Unit.fp32: 163e12},
        bandwidth=5.3e12,
    ),
}


class Work(NamedTuple):
    """What a call has to do at least: operations of a unit, and bytes that every tensor takes once."""

    operations: float
    bytes: float
    unit: Unit = Unit.fp32

    def bound(self, chip: Chip) -> tuple[float, str]:
        """Seconds at the roofline, and what they are spent on."""
        compute, memory = self.operations / chip.rates[self.unit], self.bytes / chip.bandwidth
        return max(compute, memory), "memory" if memory > compute else str(self.unit)
