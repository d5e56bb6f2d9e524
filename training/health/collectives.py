"""Which collectives a rank has joined, as torch's flight recorder remembers them, and who is missing in one.

    rank 0   dp data: 57 joined, waits in the last, an all_reduce
    rank 1   dp data: 56 joined                                        -> rank 1 is missing in the 57th of dp data

The recorder knows gloo's collectives and NCCL's, where TORCH_FR_BUFFER_SIZE is set before there are groups
(``network.trace``). What goes from rank to rank one by one, as all-to-all over gloo, it does not know.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from training.health.beat import locate

FILE = "collectives.json"  # of a rank


@dataclass(frozen=True, slots=True)
class Joined:
    """What a rank has joined of a group's collectives."""

    group: str  # its name, the same on all of its ranks
    words: str  # what it is for
    count: int  # so many
    last: str  # the kind of the last
    waits: bool  # in the last


def read_joined() -> list[Joined]:
    """Of this rank, now; nothing where torch has no recorder."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_fr_trace_json", None)
    last: dict[str, Joined] = {}
    for entry in json.loads(dump()).get("entries", []) if dump is not None else []:
        if not entry["is_p2p"]:
            name, words = entry["process_group"]
            kind = entry["profiling_name"].rpartition(":")[2]
            last[name] = Joined(name, words, entry["collective_seq_id"], kind, not entry["retired"])
    return list(last.values())


def keep(run: Path, rank: int) -> None:
    """Writes down what this rank has joined. Raises nothing: whoever calls has worse to tell."""
    with suppress(Exception):
        text = json.dumps([asdict(each) for each in read_joined()])
        locate(run, rank, FILE).write_text(text, encoding="utf-8")


def read_kept(run: Path, rank: int) -> list[Joined]:
    """What a rank has kept; nothing where it has not."""
    try:
        return [Joined(**row) for row in json.loads(locate(run, rank, FILE).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


def find_missing(kept: Mapping[int, Sequence[Joined]]) -> list[str]:
    """A line for each collective in which ranks wait that others, of the same group, have not joined; by rank."""
    groups: dict[str, dict[int, Joined]] = {}
    for rank, rows in kept.items():
        for row in rows:
            groups.setdefault(row.group, {})[rank] = row
    lines = []
    for ranks in groups.values():
        furthest = max(row.count for row in ranks.values())
        waiting = [rank for rank, row in ranks.items() if row.waits and row.count == furthest]
        missing = [f"rank {rank} has joined {row.count}" for rank, row in ranks.items() if row.count < furthest]
        if waiting and missing:
            row = ranks[waiting[0]]
            who = ", ".join(map(str, waiting))
            lines.append(
                f"{row.words}: rank{'s' * (len(waiting) > 1)} {who} wait{'s' * (len(waiting) == 1)} in collective "
                f"{row.count}, {row.last}; {', '.join(missing)}"
            )
    return lines
