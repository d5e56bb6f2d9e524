"""When buckets start: behind their last gradient, in one order, and never on a guess."""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from training.countdown import Countdown

BUCKETS = [["head", "norm"], ["up", "down"], ["tied"]]
FIRST = ["head", "norm", "up", "down", "tied"]  # a backward before the last
LAST = ["tied", "head", "norm", "down", "up", "tied"]  # tied is used twice


def run(
    countdown: Countdown, ahead: Sequence[Any], last: Sequence[Any], coming: Sequence[Any] | None = None
) -> list[tuple[int, int]]:
    """A step: each bucket that started inside the last backward, and behind how many of its gradients."""
    countdown.begin()
    assert not [number for member in ahead for number in countdown.take(member)]
    started = [(number, 0) for number in countdown.open(coming)]
    for count, member in enumerate(last, start=1):
        started += [(number, count) for number in countdown.take(member)]
    countdown.close()
    return started


def test_buckets_start_behind_their_last_gradient_once_it_is_known() -> None:
    countdown = Countdown(BUCKETS)
    assert run(countdown, FIRST, LAST) == []
    assert run(countdown, FIRST, LAST) == [(0, 3), (1, 5), (2, 6)]
    assert run(countdown, FIRST, LAST) == [(0, 3), (1, 5), (2, 6)]


def test_a_single_backward_is_learned_from_as_well() -> None:
    countdown = Countdown(BUCKETS)
    assert [run(countdown, [], LAST) for _ in range(2)] == [[], [(0, 3), (1, 5), (2, 6)]]


def test_what_is_put_off_is_known_at_once() -> None:
    """Norms have their last gradient before the last W; experts in two chunks get two in it."""
    countdown, ahead = Countdown([["norm"], ["up", "down"], ["bias"], ["idle"]]), ["norm", "bias", "up", "down"]
    put_off = ["down", "up", "up"]
    for _ in range(2):
        assert run(countdown, 2 * ahead, put_off, put_off) == [(0, 0), (1, 3), (2, 3)]
    # Half of it does not come: nothing starts that waits for it.
    assert run(countdown, 2 * ahead, put_off[:2], put_off) == [(0, 0)]


def test_another_schedule_is_learned_anew() -> None:
    """More micro-batches: what came at the end of fewer says nothing."""
    countdown = Countdown(BUCKETS)
    run(countdown, FIRST, LAST)
    assert run(countdown, 2 * FIRST, FIRST) == []
    assert run(countdown, 2 * FIRST, FIRST) == [(0, 2), (1, 4), (2, 5)]


@pytest.mark.parametrize("missing", ["head", "up", "tied"])
def test_without_a_gradient_a_bucket_and_those_behind_it_wait(missing: str) -> None:
    countdown, place = Countdown(BUCKETS), next(n for n, bucket in enumerate(BUCKETS) if missing in bucket)
    ahead, last = ([member for member in some if member != missing] for some in (FIRST, LAST))
    run(countdown, FIRST, LAST)
    run(countdown, FIRST, last)
    assert [number for number, _ in run(countdown, FIRST, last)] == list(range(place))
    # A step that lacked it says nothing of the next one: what had a gradient before gets another.
    countdown = Countdown(BUCKETS)
    run(countdown, FIRST, last)
    assert [number for number, _ in run(countdown, FIRST, FIRST if missing == "tied" else LAST)] == [0, 1, 2]
    # Never there at all: nobody knows whether it comes.
    countdown = Countdown(BUCKETS)
    for _ in range(3):
        started = run(countdown, ahead, last)
    assert [number for number, _ in started] == list(range(place))


def test_one_gradient_too_many_ends_foresight_for_this_step() -> None:
    countdown = Countdown(BUCKETS)
    for _ in range(2):
        run(countdown, FIRST, LAST)
    more = ["head", "head", *LAST]
    assert run(countdown, FIRST, more) == []
    # From then on the most that ever came is waited for.
    assert run(countdown, FIRST, LAST) == []
    assert run(countdown, FIRST, more) == [(0, 5), (1, 7), (2, 8)]


def test_others_are_nobodys_business() -> None:
    countdown = Countdown(BUCKETS)
    for _ in range(2):
        run(countdown, [*FIRST, "shared"], LAST)
    assert run(countdown, [*FIRST, "shared", "shared"], ["shared", *LAST, "shared"]) == [(0, 4), (1, 6), (2, 7)]


@pytest.mark.parametrize("seed", range(20))
def test_any_steps_start_in_one_order_and_never_early(seed: int) -> None:
    """Steps of one shape, in which gradients come in any order: what starts is a beginning of the same order."""
    draw = random.Random(seed)  # noqa: S311 (no secret)
    members = list(range(12))
    buckets = [members[first : first + 3] for first in range(0, 12, 3)]
    last = [member for member in members for _ in range(draw.randint(1, 3))]
    countdown = Countdown(buckets)
    for step in range(6):
        draw.shuffle(last)
        missing = draw.choice(members) if step == 4 else None
        came = [member for member in last if member != missing]
        started = run(countdown, members, came)
        whole = [n for n, bucket in enumerate(buckets) if missing not in bucket]
        expected = len(buckets) if missing is None else next((n for n, b in enumerate(buckets) if missing in b))
        assert [number for number, _ in started] == list(range(expected if step else 0))
        assert set(range(expected)) <= set(whole)
        for number, behind in started:
            rest = Counter(came[behind:])
            assert not any(rest[member] for member in buckets[number]), "a gradient came behind the start"
