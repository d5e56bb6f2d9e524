"""Ranks that tests run on: values come back; what goes wrong in one rank is told and leaves nobody behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from spawn import RankError, run_ranks
from torch import Tensor


def add_ranks(rank: int, world: int, addend: Tensor) -> tuple[int, Tensor]:
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    addend += 1  # a copy: no other rank and not the parent sees it
    return rank, total + addend


def fail_in_one(rank: int, world: int) -> None:
    if rank == 1:
        raise ValueError("no such layer")
    dist.all_reduce(torch.zeros(1))


def hang_in_one(rank: int, world: int, folder: Path) -> None:
    (folder / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        time.sleep(60)
    dist.all_reduce(torch.zeros(1))


def die_in_one(rank: int, world: int) -> None:
    if rank == 1:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.zeros(1))


def warn(rank: int, world: int) -> None:
    import warnings

    warnings.warn("doubtful", stacklevel=1)


def report(rank: int, world: int) -> tuple[int, int]:
    return os.getpid(), torch.get_num_threads()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_come_back_by_rank(world: int) -> None:
    addend = torch.tensor([0.5])
    total = sum(range(world)) + 1.5
    assert run_ranks(add_ranks, world, addend) == [(rank, torch.tensor([total])) for rank in range(world)]
    assert addend.item() == 0.5


def test_ranks_are_processes_with_one_thread_that_are_gone_afterwards() -> None:
    answers = run_ranks(report, 3)
    assert len({pid for pid, _ in answers} | {os.getpid()}) == 4
    assert all(threads == 1 and not alive(pid) for pid, threads in answers)


def test_an_exception_names_its_rank_while_another_waits() -> None:
    started = time.monotonic()
    with pytest.raises(RankError) as error:
        run_ranks(fail_in_one, 2)
    assert str(error.value).startswith("rank 1 of 2 failed:\nTraceback")
    assert "ValueError: no such layer" in str(error.value)
    assert time.monotonic() - started < 30


def test_a_hang_tells_what_each_rank_was_doing(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="no answer after 2 s") as error:
        run_ranks(hang_in_one, 2, tmp_path, timeout=2)
    first, _, second = str(error.value).partition("rank 1 was here")
    assert "all_reduce" in first and "all_reduce" not in second and "in hang_in_one" in second
    assert not any(alive(int((tmp_path / str(rank)).read_text())) for rank in range(2))


def test_a_rank_that_is_killed_is_named_with_its_last_words() -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed:\nended without an answer\nits output: last words"):
        run_ranks(die_in_one, 2)


def test_a_warning_in_a_rank_is_an_error() -> None:
    with pytest.raises(RankError, match="UserWarning: doubtful"):
        run_ranks(warn, 1)


def test_ranks_end_with_their_parent(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from spawn import *; from test_spawn import *; "
        f"run_ranks(hang_in_one, 2, Path({str(tmp_path)!r}))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    deadline = time.monotonic() + 60
    while len([path for path in tmp_path.iterdir() if path.read_text()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pids = [int(path.read_text()) for path in tmp_path.iterdir()]
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))
