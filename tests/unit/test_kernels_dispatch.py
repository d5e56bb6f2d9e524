"""Dispatch into the peers' buffers and combine out of them, in Triton's interpreter: numbers, gradients and waiting."""

import pytest
from interpreted_start import Interpreter

CASES = [([5], 16), ([7, 3], 40), ([9, 1, 0, 6], 24)]


@pytest.mark.parametrize(("tokens", "width"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dispatch(interpreter: Interpreter, tokens: list[int], width: int, dtype: str) -> None:
    interpreter.run("interpreted_dispatch:check_dispatch", tokens, width, dtype)


@pytest.mark.parametrize("idle", [0, 1, 3])
def test_a_rank_that_nothing_is_sent_to(interpreter: Interpreter, idle: int) -> None:
    interpreter.run("interpreted_dispatch:check_dispatch", [4, 5, 3, 2], 16, "float32", idle)
    interpreter.run("interpreted_dispatch:check_combine", [4, 5, 3, 2], 16, "float32", idle)


def test_rows_of_others_come_first(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_dispatch:check_order_of_rows")


def test_rows_may_be_bytes(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_dispatch:check_dispatch", [5, 6], 37, "uint8")


@pytest.mark.parametrize(("tokens", "width"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_combine(interpreter: Interpreter, tokens: list[int], width: int, dtype: str) -> None:
    interpreter.run("interpreted_dispatch:check_combine", tokens, width, dtype)


def test_a_token_without_rows(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_dispatch:check_a_token_without_rows")


def test_each_is_the_gradient_of_the_other(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_dispatch:check_each_is_the_gradient_of_the_other")


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [([6, 5], "bfloat16"), pytest.param([6, 0, 9, 4], "float32", marks=pytest.mark.full)],
)
def test_ranks_wait_for_each_other(interpreter: Interpreter, tokens: list[int], dtype: str) -> None:
    interpreter.run("interpreted_dispatch:check_ranks", tokens, dtype)


def test_reading_early_would_be_seen(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_dispatch:check_reading_early_shows")
