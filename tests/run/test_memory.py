"""What engines hold is what their formulas say: the benchmark behind docs/engines.md, on a small model."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of the gradients that have been added up: what is left when they are summed, and when the step is over.
LEFT = {"native": (1, 1), "fsdp2": (1, 1), "zero1": (0.5, 0), "zero2": (1, 0), "zero3": (1, 1)}


@pytest.mark.full
@pytest.mark.parametrize("engine", LEFT)
def test_an_engine_holds_what_its_formula_says(engine: str) -> None:
    command = [sys.executable, "benchmarks/memory.py", engine, "--run", "tiny", "--layouts", "dp=2"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert printed.returncode == 0, printed.stderr
    layout, name, *figures = printed.stdout.splitlines()[-1].split()
    weights, moments, added, summed, over, counted, formula, *_ = map(float, figures)
    assert (layout, name) == ("dp=2", engine)
    assert counted == pytest.approx(formula, rel=0.01) and counted == pytest.approx(weights + moments + added, abs=0.2)
    assert (summed / added, over / added) == pytest.approx(LEFT[engine], abs=0.02)
