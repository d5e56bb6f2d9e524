"""Who is missing in a collective, from what real ranks have joined."""

from pathlib import Path

import torch
import torch.distributed as dist
from spawn import run_ranks

from training.health.beat import locate
from training.health.collectives import FILE, Joined, find_missing, keep, read_kept


def join(rank: int, world: int, run: Path) -> list[Joined]:
    """All ranks join three collectives, the last rank no fourth one until others have kept what they wait in."""
    group = dist.new_group(list(range(world)), group_desc="dp data")
    for _ in range(3):
        dist.all_reduce(torch.ones(2), group=group)
    locate(run, rank, FILE).parent.mkdir(parents=True)
    missing = rank == world - 1
    work = None if missing else dist.all_reduce(torch.ones(2), group=group, async_op=True)
    keep(run, rank)
    dist.barrier()
    if missing:
        dist.all_reduce(torch.ones(2), group=group)
    if work is not None:
        work.wait()
    return read_kept(run, rank)


def test_the_rank_that_has_not_joined_is_named(tmp_path: Path) -> None:
    kept = dict(enumerate(run_ranks(join, 3, tmp_path)))
    assert all(any(row.words == "dp data" for row in rows) for rows in kept.values())
    assert find_missing(kept) == ["dp data: ranks 0, 1 wait in collective 4, all_reduce; rank 2 has joined 3"]


def test_nobody_is_missing_where_all_have_joined() -> None:
    done = Joined("a", "dp data", 4, "all_reduce", False)
    waits = Joined("a", "dp data", 4, "all_reduce", True)
    assert find_missing({0: [waits], 1: [waits], 2: [done]}) == []
    assert find_missing({0: [done], 1: [Joined("a", "dp data", 3, "all_reduce", False)]}) == [], "nobody waits"
    assert find_missing({}) == find_missing({0: []}) == []
    assert read_kept(Path("nowhere"), 0) == []
