"""Fine-tuning on conversations: a run learns the answers, and any number of ranks trains on the same ones."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_data_records import write_lines
from test_train import SMALL

COMMAND = [sys.executable, "-m", "launcher.train", *SMALL, "precision=fp32", "run.sample.tokens=0", "verify=skip"]
WORDS = (
    "data.corpus=[talks.jsonl]",
    "data.chat=chatml",
    "data.sequence_length=128",
    "data.held_out=0.2",
    "run.threads=1",
)


def talk(number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"what follows {number}?"}
    return {"messages": [question, {"role": "assistant", "content": "the next one, as always"}]}


def train(place: Path, run: str, *words: str) -> tuple[str, list[dict[str, Any]]]:
    done = subprocess.run(
        [*COMMAND, *WORDS, f"run.id={run}", *words], cwd=place, capture_output=True, text=True, timeout=240
    )
    assert not done.returncode, done.stdout + done.stderr
    rows = [json.loads(line) for line in (place / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    return done.stdout, [row for row in rows if row["kind"] == "step"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_lines(tmp_path / "talks.jsonl", (talk(number) for number in range(400)))
    return tmp_path


def test_answers_are_learnt(place: Path) -> None:
    said, rows = train(place, "one", "run.steps=60", "optimizer.lr=1e-2")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and "cut" not in said
    _, two = train(place, "two", "run.steps=3", "optimizer.lr=1e-2", "parallel.dp=2", "parallel.ep=2")
    for a, b in zip(rows, two, strict=False):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_conversations_that_are_too_long_are_said(place: Path) -> None:
    records = [talk(number) for number in range(400)]
    for record in records[::9]:
        record["messages"].append({"role": "assistant", "content": "as always, " * 20})
    write_lines(place / "talks.jsonl", records)
    said, _ = train(place, "cut", "run.steps=1")
    assert re.search(r"^\d+ of 3\d\d conversations are longer than data.sequence_length, and cut$", said, re.M)
    mixed = [word for word in WORDS if not word.startswith("data.corpus")]
    words = [*COMMAND, *mixed, "data.mixture={talks.jsonl: 1}", "run.steps=1", "run.id=mixed"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=240)
    assert re.search(r"^\d+ of 3\d\d conversations of talks.jsonl are longer than", done.stdout, re.M), done.stderr
    words = [*COMMAND, *WORDS, "data.sequence_length=64", "run.id=none"]
    done = subprocess.run(words, cwd=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "data.sequence_length=64 is shorter than every conversation" in done.stderr
