"""The order in which buckets start is a pure function of names: whatever a rank has gradients of, and in what order."""

import random
import threading
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import nn

from training.beside import Ahead, Beside
from training.engine import Share
from training.slab import Bucket, Slab
from training.transit import Sums

CPU = torch.device("cpu")
STAGES, EACH = 2, 6  # stages, and parameters of each
SHARED = {0, 4, 9}  # held by other pipeline ranks too


class Noted:
    """Stands for a slab of two holders: notes when buckets, of one parameter each, start."""

    degree = 2

    def __init__(self) -> None:
        self.started: list[int] = []

    def is_started(self, number: int) -> bool:
        return number in self.started

    def close(self, number: int) -> Callable[[], Callable[[], None]]:
        assert number not in self.started
        self.started.append(number)
        return lambda: lambda: None


def take_step(sums: Sums, slab: Noted, parameters: list[nn.Parameter], draw: random.Random, missing: int) -> list[int]:
    """Two backwards of each stage, the last stage first -> the buckets in the order in which they started, in all and
    before their stage was finished."""
    sums.begin()
    slab.started.clear()
    early = []
    for stage in reversed(range(STAGES)):
        for last in (False, True):
            if last:
                sums.open(stage)
            members = [n for n in range(stage * EACH, stage * EACH + EACH) if n != missing]
            for number in draw.sample(members, len(members)):
                sums.take(parameters[number])
        early += [number for number in slab.started if number // EACH == stage]
        sums.close(stage)
    sums.settle()
    return early


@pytest.mark.parametrize("seed", range(10))
def test_sums_start_in_one_order_on_every_rank(seed: int) -> None:
    expected = [n for n in (*range(11, 5, -1), *range(5, -1, -1)) if n not in SHARED] + sorted(SHARED, reverse=True)
    seen = set[int]()
    for rank in range(3):
        slab, draw = Noted(), random.Random(100 * seed + rank)  # noqa: S311 (no secret)
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(STAGES * EACH)]
        shares = [
            Share((n // EACH,), n in SHARED, Bucket(cast(Slab, slab), n, n, (parameter,)))
            for n, parameter in enumerate(parameters)
        ]
        sums = Sums(draw.sample(shares, len(shares)), range(STAGES), CPU)
        for step in range(5):
            missing = draw.randrange(len(parameters)) if step == rank + 1 else -1
            early = take_step(sums, slab, parameters, draw, missing)
            assert slab.started == expected
            assert not SHARED & set(early) and (step or not early)
            seen |= set(early)
    assert len(seen) == len(expected) - len(SHARED)


def test_two_at_most_are_under_way_and_all_are_complete_in_order() -> None:
    beside, events = Beside(CPU), list[tuple[str, int]]()

    def start(number: int) -> Callable[[], None]:
        assert threading.current_thread() is not threading.main_thread() and not torch.is_grad_enabled()
        events.append(("start", number))
        return lambda: events.append(("finish", number))

    for number in range(4):
        beside.launch(lambda number=number: start(number))  # type: ignore[misc]
    beside.wait()
    under_way = 0
    for what, _ in events:
        under_way += 1 if what == "start" else -1
        assert under_way <= 2
    assert [number for what, number in events if what == "start"] == [0, 1, 2, 3]
    assert [number for what, number in events if what == "finish"] == [0, 1, 2, 3]


def test_what_fails_beside_is_raised_by_who_waits() -> None:
    beside = Beside(CPU)
    beside.launch(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        beside.wait()


def test_a_thread_ends_with_who_started_it() -> None:
    before = set(threading.enumerate())
    beside = Beside(CPU)
    beside.launch(lambda: lambda: None)
    beside.wait()
    (thread,) = set(threading.enumerate()) - before
    del beside
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_copies_are_complete_as_far_as_they_are_read(device: str) -> None:
    """On a device, two are under way at most."""
    ahead, events = Ahead(torch.device(device)), list[str]()

    def start(number: int) -> Callable[[], None]:
        events.append(f"+{number}")
        return lambda: events.append(f"-{number}")

    expected = {
        "cpu": ["+0", "+1", "+2", "+3", "-0", "-1", "-2", "-3"],
        "cuda": ["+0", "+1", "-0", "+2", "-1", "+3", "-2", "-3"],
    }[device]
    for _ in range(2):
        events.clear()
        ahead.launch([lambda number=number: start(number) for number in range(4)])  # type: ignore[misc]
        for last in (1, 0, 1):
            ahead.wait(last)
            assert [event for event in events if event[0] == "-"] == ["-0", "-1"]
        ahead.wait()
        assert events == expected
        ahead.wait(3)
