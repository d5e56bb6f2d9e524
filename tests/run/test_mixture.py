"""A run on several corpora: what it trains on, that two ranks read the same, and that it goes on where it was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_data_records import write_lines
from test_train import SMALL

from launcher.cli import main

WORDS = (
    *SMALL,
    "precision=fp32",
    "run.sample.tokens=0",
    "verify=skip",
    "run.steps=4",
    "checkpoint.every=2",
    "data.held_out=0.2",
)
MIXTURE = "data.mixture={web: '0.8 1:0.2', code.jsonl: '0.2 1:0.8'}"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "web").mkdir()
    for number in range(40):
        (tmp_path / "web" / f"{number}.txt").write_text("".join(f"line {i} of the web\n" for i in range(40)))
    write_lines(tmp_path / "code.jsonl", ({"text": f"def f{i}(): return {i}\n" * 20} for i in range(200)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(place: Path, run: str) -> list[dict[str, Any]]:
    lines = (place / "runs" / run / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: row[k] for k in ("kind", "step", "loss")} for row in found if row["kind"] in ("step", "eval")]


def test_a_run_on_a_mixture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *WORDS, MIXTURE, "run.id=whole"]) == 0
    said = capsys.readouterr().out
    assert " epochs of " in said and " are web\n" in said and " are code.jsonl\n" in said
    assert "bigram" not in said and len(rows(place, "whole")) == 5
    command = [sys.executable, "-m", "launcher.train", *WORDS, MIXTURE, "run.id=two", "parallel.dp=2", "run.threads=1"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    for one, two in zip(rows(place, "whole"), rows(place, "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    # Other weights are another text.
    other = MIXTURE.replace("0.8 1:0.2", "0.1")
    assert main(["train", *WORDS, other, "run.id=other"]) == 0
    assert rows(place, "other")[0]["loss"] != rows(place, "whole")[0]["loss"]


def test_mistakes(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *WORDS, "data.mixture={web: lots}"]) == 2
    assert "data.mixture.web=lots must be a weight" in capsys.readouterr().err
    assert main(["train", *WORDS, "data.mixture={nowhere: 1}"]) == 2
    assert "data.corpus=nowhere: no such file or folder" in capsys.readouterr().err
