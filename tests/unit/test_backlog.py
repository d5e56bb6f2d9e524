"""Weight gradients that were put off: oldest first, half of them at a wait, and never those of many micro-batches."""

import torch

from model.linear import WeightGradient
from parallel.overlap.backlog import Backlog


def put_off(names: str) -> list[WeightGradient]:
    return [WeightGradient(torch.empty(0), lambda name=name: torch.tensor(ord(name))) for name in names]


def watch(*sources: list[WeightGradient]) -> tuple[Backlog, list[str]]:
    done: list[str] = []
    backlog = Backlog(lambda gradient: done.append(chr(int(gradient.compute()))))
    for number, source in enumerate(sources):
        backlog.watch(f"0W{number}", source)
    return backlog, done


def test_half_of_them_at_a_wait_oldest_first() -> None:
    source = put_off("abc")
    backlog, done = watch(source)
    backlog.idle()
    assert done == ["a", "b"]
    source += put_off("de")  # the backward goes on
    backlog.watch("0W1", put_off("f"))
    backlog.idle()
    assert "".join(done) == "abcd" and backlog.count() == 2
    backlog.drain()
    assert "".join(done) == "abcdef" and backlog.count() == 0
    backlog.idle()
    assert "".join(done) == "abcdef"


def test_few_at_a_short_wait() -> None:
    backlog, done = watch(put_off("abcd"))
    backlog.idle(1)
    assert done == ["a"]
    backlog.drain()
    backlog.idle(1)
    assert "".join(done) == "abcd"


def test_no_more_than_two_micro_batches_pile_up_where_nothing_waits() -> None:
    backlog, done = watch(put_off("ab"), put_off("cd"), put_off("e"))
    assert "".join(done) == "ab" and backlog.count() == 3
    backlog.watch("0W3", put_off("f"))
    assert "".join(done) == "abcd" and backlog.count() == 2
