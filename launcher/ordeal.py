"""One run of a campaign: started like any other, and again where it was ended, until it is over; what it said, when."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import cli
from launcher.campaign import Line, Mark
from training.health.config import FailAt, locate_mark
from training.metrics import STEPPED

CLOCKS = ("seconds", "tokens_per_second", "peak_memory")  # what may differ
STARTS = 50  # of a run, at most


def start(root: Path, name: str, words: Sequence[str], faults: Sequence[FailAt]) -> list[Line]:
    """A run to its end, started again where it was ended. What it said, and when."""
    own = [f"run.folder={root}", f"run.id={name}", f"health.faults=[{','.join(repr(str(fault)) for fault in faults)}]"]
    command = [sys.executable, "-m", "launcher.train", *words, *own]
    lines: list[Line] = []
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.log").open("w", encoding="utf-8") as log:
        for _ in range(STARTS):
            with subprocess.Popen(  # noqa: S603
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
            ) as process:
                assert process.stdout is not None
                for text in process.stdout:
                    lines.append(Line(time.time(), text.rstrip("\n")))
                    log.write(f"{lines[-1].time:.3f} {text}")
            if process.returncode == 0:
                return lines
            if process.returncode == cli.MISTAKE:
                raise ValueError(f"a run was refused: {lines[-1].text if lines else command}")
    return lines


def read_rows(run: Path) -> list[dict[str, Any]]:
    """Steps, loads of experts and evaluations of a run, without what a clock says."""
    path = run / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in found if row["kind"] in STEPPED]


def read_marks(run: Path, faults: Sequence[FailAt]) -> list[Mark | None]:
    """When each of ``faults`` happened in ``run``; None: never."""
    places = [locate_mark(run, faults, number) for number in range(len(faults))]
    return [Mark(**json.loads(place.read_text())) if place.exists() else None for place in places]
