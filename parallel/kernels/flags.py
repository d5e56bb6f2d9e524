"""Flags in memory: how a kernel on one device learns that another device has written what it is about to read.

    writer   store ... store   barrier of the program   add to the flag (release, system)
                                                              |
    reader                     poll the flag (acquire, system)    barrier of the program   load ... load

A flag is one int32. It is zero before a use, only ever added to, and always with an atomic of system scope, as the
other end is another device. A reader waits for the exact total that it knows in advance. Between two uses flags are
zeroed behind a barrier of all ranks (``parallel.kernels.peers``).

Reading goes through ``tl.atomic_cas`` with the awaited value for both of its own: it changes nothing. One thread asks,
acquires, and the program's barrier hands what it found and the order on to the other threads, so that all leave the
loop together. A loop over an ordinary volatile load would not do: every warp would load for itself, two warps could
read different values and leave the loop at different times. ``tl.atomic_poll``, which asks with plain loads, came after
Triton 3.7, and torch 2.13 comes with 3.7.1 where there is a GPU. Flags that are polled lie on the device
that polls, and an exchange that changes nothing breaks no chain of additions: who reads the last has acquired from all.

Adding goes through ``tl.atomic_add`` behind a barrier of the program, so that the stores of all its threads come first.
Triton 3.9 puts one there by itself, 3.7 does not. A barrier of gfx942 waits for no store of another wave: before it
every wave writes back and waits itself. The release would write back as well, and does not wait for it where Triton
is 3.7, whose LLVM drops that wait (llvm-project pull request 178316).

What is addressed on a peer is found through a table: int64 [n], the address of each rank's buffer as this rank sees it.

Memory ordering: PTX ISA, "Memory Consistency Model"; LLVM, "User Guide for AMDGPU Backend", memory model of gfx942.
This has never run on a GPU; docs/kernels.md says what was checked instead.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip_cdna3, is_hip_cdna4

WRITE_BACK = tl.constexpr("buffer_wbl2 sc0 sc1\ns_waitcnt vmcnt(0)")  # of a wave, for peers to see what it stored


class Launch(NamedTuple):
    """How a kernel that moves rows is cut: a program takes ``rows`` x ``columns`` at a time; powers of two."""

    rows: int = 16
    columns: int = 512
    warps: int = 4


@triton.jit
def wait_for(flag, value):  # type: ignore[no-untyped-def]
    """Returns when ``flag`` is ``value``. What its writers stored before can be read from here on."""
    while tl.atomic_cas(flag, value, value, sem="acquire", scope="sys") != value:
        pass


@triton.jit
def raise_flag(flag, by):  # type: ignore[no-untyped-def]
    """Adds to ``flag`` after everything that this program has stored."""
    if is_hip_cdna3() or is_hip_cdna4():
        tl.inline_asm_elementwise(WRITE_BACK, "=v,v,~{memory}", [by], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()
    tl.atomic_add(flag, by, sem="release", scope="sys")


@triton.jit
def find(table, rank, kind: tl.constexpr):  # type: ignore[no-untyped-def]
    """The buffer of ``rank`` by ``table``, aligned to 16 bytes, as a pointer to ``kind``."""
    return tl.multiple_of(tl.load(table + rank).to(tl.pointer_type(kind)), 16)


@triton.jit
def find_flags(table, rank):  # type: ignore[no-untyped-def]
    """The flags of ``rank`` by ``table``."""
    return tl.load(table + rank).to(tl.pointer_type(tl.int32))


@triton.jit(do_not_specialize=["place", "by"])
def _announce(table, place, by):  # type: ignore[no-untyped-def]
    raise_flag(find_flags(table, tl.program_id(0)) + place, by)


@triton.jit(do_not_specialize=["place", "by"])
def _mark(flags, place, by):  # type: ignore[no-untyped-def]
    raise_flag(flags + place, by)


@triton.jit(do_not_specialize=["count"])
def _await(flags, expected, count):  # type: ignore[no-untyped-def]
    for i in range(count):
        wait_for(flags + i, tl.load(expected + i))


def announce(table: Tensor, place: int, by: int = 1) -> None:
    """Adds ``by`` to flag ``place`` of every rank in ``table`` [n] int64, after all earlier work of this stream.

    It is a kernel of its own, because a kernel's writes are complete where the next kernel of its stream begins.
    """
    assert table.dtype == torch.int64 and table.ndim == 1
    _announce[(len(table),)](table, place, by, num_warps=1, enable_fp_fusion=True)


def mark(flags: Tensor, place: int, by: int = 1) -> None:
    """Adds ``by`` to element ``place`` of this rank's ``flags`` [...] int32, after all earlier work of this stream."""
    assert flags.dtype == torch.int32 and flags.is_contiguous()
    _mark[(1,)](flags, place, by, num_warps=1, enable_fp_fusion=True)


def await_flags(flags: Tensor, expected: Tensor) -> None:
    """Holds this stream until ``flags`` [n] int32 are ``expected`` [n] int32. Later kernels may read what came."""
    assert flags.dtype == expected.dtype == torch.int32 and flags.shape == expected.shape and flags.is_contiguous()
    _await[(1,)](flags, expected, len(flags), num_warps=1, enable_fp_fusion=True)
