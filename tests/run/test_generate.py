"""``shoestring generate`` as it is typed: by id and by path, the same text for a seed, mistakes named."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_train import SMALL

from launcher.cli import main

Generate = Callable[..., str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run called ``mine`` has been."""
    folder = tmp_path_factory.mktemp("generate")
    (folder / "text.txt").write_text("漢字と仮名、そして🙂🙃 naïve Wörter. " * 300)
    quick = ("run.steps=30", "run.id=mine", "optimizer.lr=1e-2", "run.sample.tokens=0", "precision=fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "data.corpus=[text.txt]", *SMALL, *quick]) == 0
    return folder


@pytest.fixture
def generate(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Calls the command; gives what it prints, or what it complains about."""
    monkeypatch.chdir(folder)

    def call(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        assert main(["generate", *words]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return call


def test_the_command_writes_utf8(folder: Path) -> None:
    """Also where it goes to a pipe, and never a part of a character."""
    command = [sys.executable, "-m", "launcher.generate", "mine", "prompt=漢字 = ", "tokens=40", "threads=1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    assert done.stdout.decode("utf-8").startswith("漢字 = ") and len(done.stdout) > 20


def test_text_by_id_and_by_path(generate: Generate, folder: Path) -> None:
    words = ("prompt=漢字 = ", "tokens=40", "seed=3", "threads=1")
    by_id, by_path = generate("mine", *words), generate(str(folder / "runs" / "mine"), *words)
    assert by_id == by_path and by_id.startswith("漢字 = ") and len(by_id) > len("漢字 = ") + 5
    assert generate("mine", *words[:2], "seed=4", "threads=1") != by_id


def test_greedy_needs_no_seed(generate: Generate) -> None:
    texts = [generate("mine", "temperature=0", "tokens=30", f"seed={seed}", "threads=1") for seed in (0, 1)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("yours",), "run=yours must be a run's folder or the id of a run"),
        ((), "generate needs <run>"),
        (("mine", "temperature=-1"), "temperature=-1.0 must not be negative"),
        (("mine", "temprature=1"), "there is no key temprature"),
        (("mine", "device=cuda"), "device=cuda"),
    ],
)
def test_mistakes_are_named(generate: Generate, words: tuple[str, ...], message: str) -> None:
    assert message in generate(*words, code=2)


def test_damaged_weights_are_named(generate: Generate, folder: Path) -> None:
    file = next((folder / "runs" / "mine" / "weights").glob("*.safetensors"))
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert "is damaged" in generate("mine", code=2)
    finally:
        file.write_bytes(content)
