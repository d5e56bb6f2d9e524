"""Records that were left out because they are none, or have no text: beside the shard whose making met them.

train-00003.tokens.malformed.jsonl    {"file": "web/17.jsonl", "line": 40218, "why": "no field text"}
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIX = ".malformed.jsonl"
NAMED = 5  # of all


class Malformed(NamedTuple):
    """One of them. ``line``: in the file, or row, from 1."""

    file: str
    line: int
    why: str


def keep_malformed(shard: Path, found: Sequence[Malformed]) -> None:
    """Writes what the making of the file ``shard`` met, before that is there."""
    path = shard.with_name(shard.name + SUFFIX)
    path.unlink(missing_ok=True)
    if found:
        path.write_text("".join(json.dumps(each._asdict()) + "\n" for each in found), encoding="utf-8")


def _read(folder: Path) -> Iterator[Malformed]:
    for path in sorted(folder.glob("*" + SUFFIX)):
        with path.open(encoding="utf-8") as file:
            yield from (Malformed(**json.loads(line)) for line in file)


def describe_malformed(folder: Path) -> Iterator[str]:
    """Lines about all that is in ``folder``: how many, the first, and where the others are."""
    rows = _read(folder)
    first = [row for _, row in zip(range(NAMED), rows, strict=False)]
    count = len(first) + sum(1 for _ in rows)
    if count:
        yield f"{count:,} malformed records were left out; all are in {folder}/*{SUFFIX}"
        yield from (f"  {row.file}:{row.line}: {row.why}" for row in first)
