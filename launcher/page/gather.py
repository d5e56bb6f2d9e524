"""What a run's folder has for its page. Most of it may be missing: runs crash, go on, are dense, are of one rank."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import RunConfig
from launcher import folder
from launcher.page.read import Record, number, read_record
from launcher.report import read_verdict
from launcher.standing import Progress, read_beats, read_endings, stand
from training.ledger import PARTS, Attempt, look

LARGEST = 700_000  # bytes of a picture that the page takes up
LONGEST = 4000  # characters of a sample, a command, an error


class Evaluation(NamedTuple):
    """A set of an evaluation: ``evaluations/*/result.json``."""

    name: str  # of the evaluation, and whether it was of the average of the weights
    set: str
    step: float
    loss: float
    bits_per_byte: float  # NaN where it has none
    tokens: float  # that were measured


class Answer(NamedTuple):
    """A number that lm-eval's harness has given to a task."""

    name: str  # of the evaluation
    task: str
    step: float
    metric: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that the page is made of."""

    path: Path
    config: RunConfig
    record: Record
    attempts: list[Attempt]
    word: str  # how it stands: launcher/standing.py
    died: str  # of what, or ""
    command: str
    versions: dict[str, Any]
    proof: dict[str, Any]
    sample: str
    schedule: bytes  # an SVG, or nothing
    schedule_size: int  # of the file, also where it is too large to be taken up
    evaluations: list[Evaluation]
    answers: list[Answer]


def gather(path: Path) -> Run:
    """Reads the folder. ValueError where its config.yaml is none that this version can read."""
    config = folder.load_config(path)
    record = read_record(path / "metrics.jsonl")
    ending = record.ending.get("ending")
    progress = Progress(step=len(record.steps), ending=None if ending is None else str(ending))
    word = stand(path, progress, read_beats(path), config.health.heartbeat)
    size, picture = _read_picture(path / "schedule.svg")
    return Run(
        path=path,
        config=config,
        record=record,
        attempts=_read_attempts(path),
        word=word,
        died="" if word in ("finished", "running") else _say_death(path),
        command=_read_text(path / "command.txt").strip(),
        versions=_read_object(path / "versions.json"),
        proof=_read_object(path / "proof.json"),
        sample=_read_text(path / "sample.txt"),
        schedule=picture,
        schedule_size=size,
        evaluations=[
            each for file in sorted(path.glob("evaluations/*/result.json")) for each in _read_evaluation(file)
        ],
        answers=[each for file in sorted(path.glob("evaluations/*/result.json")) for each in _read_answers(file)],
    )


def _read_text(path: Path) -> str:
    """The beginning of a file; "" where there is none."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(LONGEST + 1)
    except OSError:
        return ""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_picture(path: Path) -> tuple[int, bytes]:
    """Its size, and its content unless that is too much."""
    try:
        size = os.stat(path).st_size
        return size, path.read_bytes() if size <= LARGEST else b""
    except OSError:
        return 0, b""


def _read_attempts(path: Path) -> list[Attempt]:
    """Those of the ledger; none if a line of it is not one."""
    try:
        found = look(path)
    except (OSError, ValueError, TypeError):
        return []
    numbers = (
        number(value)
        for each in found
        for value in (each.ranks, each.price, each.begin, each.end, *(each.parts.get(part) for part in PARTS))
    )
    return [] if any(map(math.isnan, numbers)) else found


def _say_death(path: Path) -> str:
    if verdict := read_verdict(path):
        return str(verdict.words)[:LONGEST]
    if endings := read_endings(path):
        first = endings[0]
        error = first.error.splitlines()[0] if first.error else "no exception"
        return f"rank {first.rank} on {first.node} died first, in {first.action}: {error}"[:LONGEST]
    return ""


def _read_evaluation(path: Path) -> list[Evaluation]:
    """A line for each set that says a loss."""
    found = _read_object(path)
    sets = found.get("sets")
    title, rows = _name(path, found), []
    for name, each in sets.items() if isinstance(sets, dict) else ():
        if not isinstance(each, dict) or math.isnan(number(each.get("loss"))):
            continue
        loss, bits = number(each.get("loss")), number(each.get("bits_per_byte"))
        measured = number(each.get("labels", each.get("tokens")))
        rows.append(Evaluation(title, str(name), number(found.get("step")), loss, bits, measured))
    return rows


def _read_answers(path: Path) -> list[Answer]:
    """A line for each number of each task."""
    found = _read_object(path)
    tasks = found.get("tasks")
    step, title, rows = number(found.get("step")), _name(path, found), []
    for task, values in tasks.items() if isinstance(tasks, dict) else ():
        for metric, value in values.items() if isinstance(values, dict) else ():
            if not math.isnan(number(value)) and metric != "sample_len":
                rows.append(Answer(title, str(task), step, str(metric).removesuffix(",none"), number(value)))
    return rows


def _name(path: Path, found: dict[str, Any]) -> str:
    return path.parent.name + ", averaged weights" * (found.get("average") is True)
