"""From what ranks have seen of their messages (launcher/preflight/probe.py) to samples of groups and of machines. Pure.

groups   the median of what the ranks of a group have seen of the same messages
links    every machine has sent to some others, and has got from some: of each, the best. So a slow machine is told
         from those that it talks to, which are fast with others
"""

from collections.abc import Sequence
from statistics import median

from launcher.preflight.judge import Sample

Row = tuple[str, list[int], float]  # what was measured, the ranks that it is between, value
INSIDE = " inside"


def join_groups(rows: Sequence[Row], nodes: Sequence[str], kind: str) -> dict[str, list[Sample]]:
    """One sample for each group, the median of what its ranks have seen. ``nodes``: the machine of each rank; ``kind``:
    of the devices that are computed on. Between processors of one machine, which lend each other their time, messages
    are as fast as who runs just then: they are told apart, and shown alone.
    """
    seen: dict[tuple[str, tuple[int, ...]], list[float]] = {}
    for check, ranks, value in rows:
        seen.setdefault((check, tuple(ranks)), []).append(value)
    found: dict[str, list[Sample]] = {}
    for (check, members), values in seen.items():
        where = tuple(dict.fromkeys(nodes[rank] for rank in members))
        inside = INSIDE if kind == "cpu" and len(where) == 1 else ""
        found.setdefault(check + inside, []).append(
            Sample(where, f"ranks {', '.join(map(str, members))}", median(values))
        )
    return found


def join_links(rows: Sequence[Row], nodes: Sequence[str]) -> dict[str, list[Sample]]:
    """The best that each machine sends, and gets. Of two machines alone what one sends is what the other gets: there
    the sender is taken to be the cause."""
    sent: dict[str, float] = {}
    got: dict[str, float] = {}
    for _, (source, target), value in rows:
        sent[nodes[source]] = max(value, sent.get(nodes[source], 0.0))
        got[nodes[target]] = max(value, got.get(nodes[target], 0.0))
    found = {"sending": [Sample((node,), "", value) for node, value in sorted(sent.items())]}
    if len(sent) > 2:
        found["receiving"] = [Sample((node,), "", value) for node, value in sorted(got.items())]
    return found
