"""benchmarks/gpu.py in Triton's interpreter, in small shapes: that it runs is all that can be seen without a GPU."""

import contextlib
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from model.kernels import cases, operators
from model.kernels.tile import Tile

SIZES = {"TOKENS": 8, "WIDTH": 256, "FFN": 128, "EXPERTS": 2, "CAME": 10, "CHOSEN": 16}


def check() -> None:
    """A line for each kernel, with its peer where it has one."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import gpu

    for name, value in SIZES.items():
        setattr(cases, name, value)
    cuts = operators.Cuts((Tile(16, 16, 128, 4, 1),), (Tile(16, 32, 128, 4, 1),))
    operators.TILES["cuda:90"], gpu.ROUNDS, gpu.NATIVE, torch.compile = cuts, 1, {}, lambda f: f  # type: ignore[assignment]

    def timer(call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        gpu.run(gpu.Real("cuda:90", "cpu"), timer, [], tried=True)
    lines = said.getvalue().splitlines()
    names = [case.name for case in cases.list_cases(cases.Inputs("cuda:90"))]
    assert [line.startswith(name) for line, name in zip(lines[1:], names, strict=True)] == [True] * len(names)
    assert sum("BF16" in line for line in lines) == 3 and any(line.endswith("embedding_bag") for line in lines)
