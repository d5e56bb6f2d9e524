"""The product that starts on chunks as they arrive, in Triton's interpreter: its numbers, its order and its waiting."""

import pytest
from interpreted_start import Interpreter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("ranks", "shape", "chunks"),
    [(1, (16, 16, 16), 1), (2, (21, 19, 37), 2), (4, (17, 33, 5), 3)],
    ids=["one rank", "ragged", "narrow"],
)
def test_numbers(interpreter: Interpreter, ranks: int, shape: tuple[int, int, int], chunks: int, dtype: str) -> None:
    interpreter.run("interpreted_gather:check_numbers", ranks, shape, chunks, dtype)


def test_tiles_start_as_their_chunk_arrives(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_gather:check_waits")


def test_reading_early_would_be_seen(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_gather:check_reading_early_shows")


def test_a_chunk_that_does_not_come_is_waited_for(interpreter: Interpreter) -> None:
    interpreter.run("interpreted_gather:check_never")
