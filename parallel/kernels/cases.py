"""Every kernel of this folder with a call, in shapes of a 7168-wide model: what is compiled ahead of time.

Work is what a call has to do at least, on links as fast as memory: what bounds these is how fast the links are.
"""

from typing import Any

import torch
from torch import Tensor

from model.kernels.chips import Unit
from model.kernels.compile import Case, count_bytes
from parallel.kernels import dispatch, flags, gather_gemm, gemm_scatter
from parallel.kernels.tile import AMD, Tile

RANKS, ROWS, WIDTH, FFN, CHUNKS, PROGRAMS = 8, 4096, 7168, 2048, 4, 124


def list_cases(target: str) -> list[Case]:
    """All kernels for ``target``, a key of CHIPS."""
    tile = AMD if target.startswith("hip") else Tile()
    table, ready = _meta(RANKS, dtype=torch.int64), _meta(RANKS, dtype=torch.int32)
    chunk_flags, gathered = _meta(RANKS, CHUNKS, dtype=torch.int32), _meta(RANKS, ROWS, WIDTH)
    x, up, down = _meta(RANKS, ROWS, FFN), _meta(FFN, WIDTH), _meta(WIDTH, FFN)
    slots, tokens, rows = _meta(RANKS, ROWS, WIDTH), _meta(ROWS, WIDTH), _rows()
    tables = gemm_scatter.Tables(table, table, CHUNKS)
    product, moved = 2 * RANKS * ROWS * WIDTH * FFN, 2 * 4 * count_bytes(tokens)
    calls: dict[str, tuple[Any, Any, float, Any]] = {
        "gather_matmul": (
            gather_gemm._gather_matmul,
            lambda: gather_gemm.gather_matmul(gathered, chunk_flags, up, 3, PROGRAMS, tile),
            product,
            (gathered, up),
        ),
        "matmul_scatter": (
            gemm_scatter._matmul_scatter,
            lambda: gemm_scatter.matmul_scatter(x, down, tables, 3, PROGRAMS, tile),
            product,
            (x, down, gathered),
        ),
        "sum_slots": (
            gemm_scatter._sum_slots,
            lambda: gemm_scatter.sum_slots(slots, chunk_flags, PROGRAMS),
            slots.numel(),
            slots,
        ),
        "dispatch": (
            dispatch._dispatch,
            lambda: dispatch.dispatch(tokens, rows, table, table, (3, PROGRAMS)),
            0,
            moved,
        ),
        "combine": (
            dispatch._combine,
            lambda: dispatch.combine(tokens, rows, table, ready, PROGRAMS),
            4 * tokens.numel(),
            moved // 2,
        ),
        "announce": (flags._announce, lambda: flags.announce(table, 3), 0, 0),
        "mark": (flags._mark, lambda: flags.mark(chunk_flags, 3), 0, 0),
        "await_flags": (flags._await, lambda: flags.await_flags(ready, ready), 0, 0),
    }
    units = dict.fromkeys(("gather_matmul", "matmul_scatter"), Unit.bf16)
    return [
        Case(name, kernel, call, operations, read, units.get(name, Unit.fp32))
        for name, (kernel, call, operations, read) in calls.items()
    ]


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _rows() -> dispatch.Rows:
    sent, of_ranks = 4 * ROWS, _meta(RANKS, dtype=torch.int32)
    source, of_copies = _meta(sent, dtype=torch.int64), _meta(sent, dtype=torch.int32)
    starts = _meta(ROWS, dtype=torch.int64)
    return dispatch.Rows(source, of_ranks, of_ranks, of_ranks, of_copies, of_copies, starts)
