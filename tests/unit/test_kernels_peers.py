"""The calls on buffers that ranks share: every rank a process, every call twice on the same buffers and flags."""

import ast
from pathlib import Path

import pytest
from interpreted_start import Interpreter

ROOT = Path(__file__).parents[2]
WORLDS = [2, pytest.param(4, marks=pytest.mark.full)]


@pytest.mark.parametrize("ranks", WORLDS)
def test_all_gather_matmul(interpreter: Interpreter, ranks: int) -> None:
    interpreter.run("interpreted_peers:check_all_gather_matmul", ranks)


@pytest.mark.parametrize("ranks", WORLDS)
def test_matmul_reduce_scatter(interpreter: Interpreter, ranks: int) -> None:
    interpreter.run("interpreted_peers:check_matmul_reduce_scatter", ranks)


@pytest.mark.parametrize("tokens", [[2, 12], pytest.param([5, 0, 7, 3], marks=pytest.mark.full)])
def test_dispatch_and_combine(interpreter: Interpreter, tokens: list[int]) -> None:
    interpreter.run("interpreted_peers:check_dispatch_and_combine", tokens)


def test_connect_takes_what_a_rendezvous_gives(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_peers:check_connect")


def test_nothing_on_the_path_of_a_cpu_run_reaches_the_kernels() -> None:
    rooms = ("configs", "launcher", "model", "parallel", "training")
    for path in (path for room in rooms for path in (ROOT / room).rglob("*.py")):
        if "kernels" not in path.parts:
            top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            assert not [node for node in top if "kernels" in ast.unparse(node)], path
