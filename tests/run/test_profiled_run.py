"""``profile.steps`` as it is typed: the default preset on two ranks that share experts, and mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import main

LAYOUT = ("parallel.dp=2", "parallel.ep=2", "parallel.pipeline.schedule=interleaved_1f1b_overlap")
SHORT = ("run.micro_batch=1", "run.steps=2", "run.threads=1", "run.eval_tokens=2048", "run.sample.tokens=0")


@pytest.mark.full
def test_the_default_preset(tmp_path: Path) -> None:
    lines = (f"line {i}: the {i * i} quick brown foxes jump over {i % 7} lazy dogs\n" for i in range(3000))
    (tmp_path / "text.txt").write_text("".join(lines))
    words = ("run=tiny", *LAYOUT, *SHORT, "data.corpus=[text.txt]", "data.workers=1", "verify=skip", "run.id=one")
    done = subprocess.run(
        [sys.executable, "-m", "launcher.train", *words, "profile.steps=2-2"],
        cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profile of steps 2-2 in runs/one/profile/trace.json: open it in ui.perfetto.dev" in done.stdout
    assert "USDT" not in done.stderr, "the profiler's own messages"
    events = json.loads((tmp_path / "runs" / "one" / "profile" / "trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        mine = [event for event in events if event["ph"] == "X" and event["pid"] == rank]
        compute = {event["name"] for event in mine if event["tid"] == 2}
        assert compute >= {f"layers.{i}.experts {op}{m}" for i in (1, 2, 3) for op in "FB" for m in range(4)}
        (flight,) = (event for event in mine if event["name"] == "layers.1.dispatch F1" and event["tid"] >= 3)
        (other,) = (event for event in mine if event["name"] == "mtp.0.experts B0" and event["tid"] == 2)
        assert flight["ts"] < other["ts"] and other["ts"] + other["dur"] < flight["ts"] + flight["dur"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("profile.steps=5-3", "profile.steps=5-3 must not end before it begins: take 3-5"),
        ("profile.steps=300-301", "profile.steps=300-301 must not go beyond the last step: run.steps=300"),
        ("profile.steps=first", "profile.steps=first must be a step or a range of them, such as 4 or 3-5"),
    ],
)
def test_mistakes(word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", word]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"shoestring: {message}"


def test_a_single_number_is_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "profile.steps=7", "--cfg", "job"]) == 0
    assert "steps: '7'" in capsys.readouterr().out
