"""The record of the shards made so far, one line of JSON each, for whoever continues."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from training.data.tokens import Shard

NAME = "journal.jsonl"


def read_journal(folder: Path) -> list[Shard]:
    """The shards recorded in ``folder``. A last line that a crash cut off is removed: its shard is made again."""
    path = folder / NAME
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return [Shard(*json.loads(line)) for line in whole.splitlines()]


def keep_present(shards: Iterable[Shard], folder: Path, itemsize: int) -> dict[str, Shard]:
    """Those of ``shards`` whose file is there with the right size, by name."""
    present = {}
    for shard in shards:
        path = folder / shard.file
        if path.exists() and path.stat().st_size == shard.count_bytes(itemsize):
            present[shard.file] = shard
    return present


def write_row(shard: Shard, record: IO[str]) -> None:
    """Records a shard whose file is committed."""
    print(json.dumps(shard), file=record, flush=True)
