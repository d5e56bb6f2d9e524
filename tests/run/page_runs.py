"""Folders of runs that have not been run: a configuration, and a record that a test writes."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from launcher.compose import Composer
from training.ledger import PARTS, SECOND

HOSTILE = "<script>alert('x')</script><img src=http://localhost/x onerror=alert(1)>\"'&"
DENSE = "model.moe.experts=0"


def make_run(path: Path, rows: Iterable[dict[str, Any]], *overrides: str) -> Path:
    """The folder ``path`` of a run of preset tiny, with these rows for its record."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(Composer().compose(overrides)[1])
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def step(number: int, **changes: Any) -> dict[str, Any]:
    """A row as training writes it, its fields in the order of ``StepRow``."""
    return {
        "kind": "step",
        "step": number,
        "loss": 2 + 3 / (1 + number),
        "mtp_losses": [3.5],
        "aux": 1.0,
        "lr": 1e-3,
        "grad_norm": 0.5 + 0.1 * math.sin(number),
        "clip_factor": 1.0,
        "tokens": 2048,
        "cursor": 8 * (number + 1),
        "seconds": 0.25,
        "tokens_per_second": 8192.0,
        "violation_worst": 0.5,
        "violation_mean": 0.25,
        "dead_experts": 1,
        "moved_experts": 0,
        "nodes_touched": 0.0,
        "bytes_inside": 0,
        "bytes_across": 0,
        "skipped": False,
        "peak_memory": 3 << 30,
        **changes,
    }


def start(**changes: Any) -> dict[str, Any]:
    """The first row."""
    return {
        "kind": "start",
        "torch": "2.13.0",
        "device": "cpu",
        "ranks": 2,
        "threads": 1,
        "compiled": False,
        "data": "0123456789abcdef",
        "parameters": 2_341_248,
        "schedule": "1f1b",
        "stages": 2,
        "micro_batches": 4,
        "bubble": 0.25,
        **changes,
    }


def load(number: int, layers: int = 4, experts: int = 8, hot: int = 1) -> dict[str, Any]:
    """Expert 0 of the last layer gets ``hot`` times what others get, and expert 1 nothing."""
    counts = [[100] * experts for _ in range(layers)]
    counts[-1][0], counts[-1][1] = 100 * hot, 0
    return {"kind": "load", "step": number, "load": counts}


def attempt(number: int, ending: str, price: float, **seconds: float) -> dict[str, Any]:
    """A line of the ledger of two ranks: ``seconds`` by part."""
    parts = dict.fromkeys(PARTS, 0) | {part: round(each * SECOND) for part, each in seconds.items()}
    begin = 10**18 * number
    return {
        "attempt": number,
        "holder": "job 7.0",
        "ranks": 2,
        "price": price,
        "begin": begin,
        "end": begin + sum(parts.values()),
        "ending": ending,
        "next": 10,
        "highest": 10,
        "parts": parts,
    }


def large(path: Path, steps: int = 6000) -> Path:
    """A run of many steps and experts that has had about everything happen to it, with a long name."""
    rows: list[dict[str, Any]] = [start(ranks=2048, device="cuda")]
    for number in range(steps):
        if number in (steps // 3, steps // 2):
            rows += [{"kind": "resume", "step": number, "tokens": number}, start()]
        if number % (steps // 20) == 0:
            rows.append(load(number, layers=59, experts=256, hot=1 + number % 7))
        bad = steps // 2 + 100 < number < steps // 2 + 150
        rows.append(
            step(number, loss=None if bad else 2 + 9 / (1 + number / 50), grad_norm=None if bad else 0.3, skipped=bad)
        )
        if number % (steps // 50) == 0:
            rows.append({"kind": "eval", "step": number, "loss": 2.1 + 9 / (1 + number / 50)})
    run = make_run(
        path, rows, "run.steps=9999999", "data.corpus=[/a/folder/with-a-name/that-does-not/want-to-end-anywhere]"
    )
    lines = [attempt(number, "killed", 36000.0, useful=900, restarts=30 + number) for number in range(1, 20)]
    (run / "ledger.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (run / "command.txt").write_text("shoestring train " + "a.very.long.key=value_without_any_space " * 30)
    (run / "sample.txt").write_text("x" * 3000)
    return run
