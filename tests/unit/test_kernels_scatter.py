"""The product whose tiles go to the ranks that own them, in Triton's interpreter: numbers, order and waiting."""

import pytest
from interpreted_start import Interpreter


@pytest.mark.parametrize(
    ("ranks", "shape", "chunks", "dtype"),
    [
        (1, (16, 16, 16), 1, "bfloat16"),
        (2, (21, 19, 37), 2, "bfloat16"),
        (4, (9, 17, 5), 2, "float32"),
        pytest.param(4, (37, 33, 40), 2, "bfloat16", marks=pytest.mark.full),
    ],
)
def test_numbers(interpreter: Interpreter, ranks: int, shape: tuple[int, int, int], chunks: int, dtype: str) -> None:
    interpreter.run("interpreted_scatter:check_numbers", ranks, shape, chunks, dtype)


def test_sums_are_made_in_the_order_of_ranks(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_scatter:check_order_of_sums")


def test_tiles_of_others_come_first(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_scatter:check_order_of_tiles")


@pytest.mark.parametrize(("ranks", "dtype"), [(2, "bfloat16"), pytest.param(4, "float32", marks=pytest.mark.full)])
def test_ranks_wait_for_each_other(interpreter: Interpreter, ranks: int, dtype: str) -> None:
    interpreter.run("interpreted_scatter:check_ranks", ranks, dtype)


def test_reading_early_would_be_seen(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_scatter:check_reading_early_shows")
