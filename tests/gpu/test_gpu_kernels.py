"""What needs a GPU: ``pytest tests/gpu -m gpu``. The checks are those that Triton's interpreter runs elsewhere."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fp8_checks as checks
import pytest
import torch

from model.fp8 import Scaling, quantise
from model.fp8_ops import REFERENCE
from model.kernels import operators

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The checks on the first GPU, in the tiles that ship."""
    cuts = operators.TILES[operators.find_chip(torch.device("cuda", 0))]
    monkeypatch.setattr(checks, "DEVICE", "cuda")
    monkeypatch.setattr(checks, "SMALL", cuts.lines)
    monkeypatch.setattr(checks, "ROUNDING", 1e-3)  # of sums in 14 bits over 128 terms
    yield


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("tile", [(1, 128), (128, 128), (1, 32)], ids=str)
@pytest.mark.parametrize("shape", [[3, 5], [130, 300], [2, 64, 129], [0, 7], [1000, 7168]], ids=str)
def test_quantisation_is_the_references(shape: list[int], tile: tuple[int, int], dtype: str) -> None:
    for powers in (False, True):
        checks.check_quantise(shape, list(tile), powers, "cpu", dtype)


@pytest.mark.parametrize("shape", [(33, 40, 130), (1, 1, 1), (260, 520, 300), (512, 768, 7168)], ids=str)
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "lines"])
def test_products(shape: tuple[int, int, int], blocks: bool) -> None:
    checks.check_multiply(*shape, blocks)


@pytest.mark.parametrize("sizes", [(5, 0, 64, 130), (0, 0, 3), (128, 256), (0, 0), (700, 1, 1300)], ids=str)
def test_products_of_experts(sizes: tuple[int, ...]) -> None:
    checks.check_rows(sizes, 7, 200, 520)
    checks.check_runs(sizes, 7, 200, True)
    checks.check_weights(sizes, 7, 200, 300)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_experts_between_products(dtype: str) -> None:
    for rows, ffn, c in ((37, 256, 128), (5, 96, 32), (0, 128, 128), (5000, 2048, 128)):
        checks.check_swiglu(rows, ffn, c, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_copies_of_tokens(dtype: str) -> None:
    for tokens, width, experts in ((9, 300, 3), (0, 300, 3), (900, 7168, 64)):
        checks.check_copies(tokens, width, experts, 2, dtype)


@pytest.mark.parametrize("groups", [(1, 1), (8, 4)], ids=str)
def test_the_routers_choice(groups: tuple[int, int]) -> None:
    for tokens in (0, 1, 4099):
        moe = {"experts": 256, "top_k": 8, "ffn": 8, "groups": groups[0], "top_groups": groups[1]}
        checks.check_router(tokens, moe)


@pytest.mark.parametrize("recipe", ["fp8", "mxfp8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_modules_run_on_kernels_as_on_the_reference(recipe: str, dtype: str) -> None:
    checks.check_modules(recipe, 700, dtype)


@pytest.mark.parametrize("key", operators.NATIVE, ids=str)
def test_torchs_products_give_what_the_reference_gives(key: tuple[str, tuple[int, int], tuple[int, int]]) -> None:
    chip, a_tile, b_tile = key
    if chip != operators.find_chip(torch.device("cuda", 0)):
        pytest.skip(f"{chip} has it")
    powers = a_tile == (1, 32)
    a = quantise(checks.normal(256, 1040), Scaling(a_tile, powers))
    b = quantise(checks.normal(512, 1040, seed=1), Scaling(b_tile, powers))
    ours, theirs = operators.multiply(a, b, torch.float32), REFERENCE.multiply(a, b, torch.float32)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-3


def test_training_starts_as_on_a_cpu(tmp_path: Path) -> None:
    """The first losses of preset tiny in FP8, on the GPU and on the CPU."""
    losses = []
    for number, device in enumerate(("cuda", "cpu")):
        words = ["run=tiny", "precision=fp8", "run.steps=5", f"run.device={device}", "checkpoint.save=false"]
        command = [sys.executable, "-m", "launcher.train", *words, f"run.folder={tmp_path}", f"run.id=run{number}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        lines = (tmp_path / f"run{number}" / "metrics.jsonl").read_text().splitlines()
        losses.append([row["loss"] for row in map(json.loads, lines) if row["kind"] == "step"])
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], rel=5e-3)
