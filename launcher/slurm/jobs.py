"""The jobs of a run, as its folder has them: jobs.jsonl, a line for each that was submitted.

{"job": "123", "time": <ns>, "command": ["shoestring", "submit", ...]}      "123_4": element 4 of an array
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

NAME = "jobs.jsonl"


class Submitted(NamedTuple):
    """A line."""

    job: str
    time: int  # ns
    command: tuple[str, ...]


def keep(run: Path, job: str, command: Sequence[str]) -> None:
    """Adds a job to those of ``run``."""
    line = json.dumps({"job": job, "time": time.time_ns(), "command": list(command)})
    with (run / NAME).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def read(run: Path) -> list[Submitted]:
    """The jobs of ``run``, the newest last. A line that is none is left out: a disk may have been full."""
    path, found = run / NAME, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found.append(Submitted(str(row["job"]), int(row["time"]), tuple(map(str, row["command"]))))
        except (ValueError, KeyError, TypeError):
            continue
    return found
