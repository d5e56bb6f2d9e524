"""The kernels of FP8 training in Triton's interpreter, against the torch references beside them."""

import random

import pytest
from interpreted_start import Interpreter

SHAPES = [[3, 5], [130, 300], [2, 64, 129], [0, 7], [256, 257]]
TILES = [(1, 128), (128, 128), (1, 32)]
RUNS = {
    "ragged": ((5, 0, 64, 130), 7),
    "last only": ((0, 0, 3), 0),
    "whole tiles": ((128, 256), 0),
    "none": ((0, 0), 4),
}
ROUTERS = {
    "no groups": {"experts": 16, "top_k": 3, "ffn": 8},
    "DeepSeek-V3": {"experts": 256, "top_k": 8, "ffn": 8, "groups": 8, "top_groups": 4},
    "odd, by the best": {"experts": 12, "top_k": 2, "ffn": 8, "groups": 3, "top_groups": 2, "score": "softmax"},
    "groups of one": {"experts": 8, "top_k": 2, "ffn": 8, "groups": 8, "top_groups": 3},
}
full = pytest.mark.full


def draw(count: int) -> list[tuple[list[int], tuple[int, int], bool, str, str]]:
    """Cases of quantisation, drawn so that every shape and every tile is there."""
    chosen = random.Random(0)  # noqa: S311
    cases = [
        (shape, TILES[(i + j) % 3], chosen.random() < 0.5, chosen.choice(["cpu", "gfx942"]), dtype)
        for j, dtype in enumerate(("bfloat16", "float32"))
        for i, shape in enumerate(SHAPES)
    ]
    return cases[:count]


@pytest.mark.parametrize(("shape", "tile", "powers", "chip", "dtype"), draw(10), ids=str)
def test_quantisation_is_the_references(
    interpreter: Interpreter, shape: list[int], tile: tuple[int, int], powers: bool, chip: str, dtype: str
) -> None:
    interpreter.run("fp8_checks:check_quantise", shape, list(tile), powers, chip, dtype)


@full
def test_quantisation_in_all_cases(interpreter: Interpreter) -> None:
    for shape in SHAPES[:3]:
        for tile in TILES:
            for powers in (False, True):
                for chip in ("cpu", "gfx942"):
                    interpreter.run("fp8_checks:check_quantise", shape, list(tile), powers, chip, "bfloat16")


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "lines"])
@pytest.mark.parametrize("shape", [(33, 40, 130), (1, 1, 1), pytest.param((130, 260, 300), marks=full)], ids=str)
def test_products(interpreter: Interpreter, shape: tuple[int, int, int], blocks: bool) -> None:
    interpreter.run("fp8_checks:check_multiply", *shape, blocks)


@pytest.mark.parametrize(("sizes", "spare"), RUNS.values(), ids=RUNS)
def test_products_of_experts(interpreter: Interpreter, sizes: tuple[int, ...], spare: int) -> None:
    interpreter.run("fp8_checks:check_rows", sizes, spare, 40, 130)
    interpreter.run("fp8_checks:check_runs", sizes, spare, 70, True)
    interpreter.run("fp8_checks:check_weights", sizes, spare, 40, 50)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_between_products(interpreter: Interpreter, dtype: str) -> None:
    for rows, ffn, c in ((37, 256, 128), (5, 96, 32), (0, 128, 128)):
        interpreter.run("fp8_checks:check_swiglu", rows, ffn, c, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copies_of_tokens(interpreter: Interpreter, dtype: str) -> None:
    for tokens, width in ((9, 300), (0, 300), (3, 1100)):
        interpreter.run("fp8_checks:check_copies", tokens, width, 3, 2, dtype)


@pytest.mark.parametrize("moe", ROUTERS.values(), ids=ROUTERS)
def test_the_routers_choice(interpreter: Interpreter, moe: dict[str, object]) -> None:
    for tokens in (0, 1, 19):
        interpreter.run("fp8_checks:check_router", tokens, moe)


MODULES = [("mxfp8", 3, "bfloat16", 128), ("fp8", 21, "float32", 256), ("fp8", 21, "bfloat16", 256)]


@pytest.mark.parametrize(
    ("recipe", "tokens", "dtype", "width"),
    [MODULES[0], *(pytest.param(*case, marks=full) for case in MODULES[1:])],
    ids=str,
)
def test_modules_run_on_kernels_as_on_the_reference(
    interpreter: Interpreter, recipe: str, tokens: int, dtype: str, width: int
) -> None:
    """Linear and experts, forward and both gradients, through the table that a GPU reads."""
    interpreter.run("fp8_checks:check_modules", recipe, tokens, dtype, width)


@full
def test_the_gpus_benchmark_runs() -> None:
    """In an interpreter of its own, whose shapes it makes small."""
    worker = Interpreter()
    try:
        worker.run("gpu_benchmark:check")
    finally:
        worker.close()
