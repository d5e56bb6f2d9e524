"""Validation: right schedules pass, and every kind of corruption is refused with rank, action and reason."""

import re
from random import Random

import pytest
from corrupt_schedules import (
    Corrupt,
    cut_off,
    double_one,
    drop_one,
    hold_back,
    join,
    lose,
    move_one,
    pair_up,
    pull_ahead,
    rename,
    renumber,
    reorder,
    repeat,
    rest_one,
    scatter,
    swap_backwards,
    swap_weights,
    turn,
)
from small_schedules import run

from parallel.pipeline.action import Action, Op, Overlap, Schedule
from parallel.pipeline.schedules import generate
from parallel.pipeline.text import parse
from parallel.pipeline.validate import validate

F, B, I, W = Op
BACK = (B, I)

VALID = [
    generate("gpipe", 3, 5),
    generate("1f1b", 1, 4),
    generate("1f1b", 4, 7),
    generate("interleaved_1f1b", 3, 7, 3),
    generate("interleaved_1f1b_overlap", 4, 9, 2),
    generate("zb_h1", 4, 6),
    generate("zb_v", 3, 8),
    generate("dualpipe", 4, 10),
    generate("dualpipe", 6, 14),
    generate("dualpipev", 3, 7),
]


NOWHERE, TWICE = "is computed by no rank", "is computed by rank .* already"
ORDER, CIRCLE = "which comes later", "waits in a circle"
ELSEWHERE, ASCEND = "on another rank", "ascend in micro-batch order"
RANGE, PAIR = "there are stages 0 to", "a pair is a forward and a backward"

CORRUPTIONS: dict[str, tuple[Corrupt, str]] = {
    "a forward is missing": (drop_one(F), NOWHERE),
    "a full backward is missing": (drop_one(B), "lacks its backward: .*" + NOWHERE),
    "an input gradient is missing": (drop_one(I), "lacks its input gradient: .*" + NOWHERE),
    "a weight gradient is missing": (drop_one(W), "lacks its weight gradient: .*" + NOWHERE),
    "a forward runs twice": (double_one(F), TWICE),
    "a backward runs twice": (double_one(*BACK), TWICE),
    "a weight gradient runs twice": (double_one(W), TWICE),
    "a forward runs on another rank too": (double_one(F, elsewhere=True), TWICE),
    "a backward runs on another rank too": (double_one(*BACK, elsewhere=True), TWICE),
    "a forward has moved to another rank": (move_one(F), ELSEWHERE),
    "a backward has moved to another rank": (move_one(*BACK), ELSEWHERE),
    "a weight gradient has moved to another rank": (move_one(W), ELSEWHERE),
    "a full backward comes before its forward": (reorder(B, F), ORDER),
    "an input gradient comes before its forward": (reorder(I, F), ORDER),
    "a weight gradient comes before its input gradient": (reorder(W, I), ORDER),
    "a weight gradient comes before its forward": (reorder(W, F), ORDER),
    "two weight gradients have changed places": (swap_weights, f"{ASCEND}|{ORDER}"),
    "two full backwards have changed places": (swap_backwards, f"{ASCEND}|{ORDER}"),
    "a forward is held back until a gradient that needs it": (hold_back, CIRCLE),
    "a backward is pulled ahead of a forward it needs": (pull_ahead, f"{CIRCLE}|{ASCEND}"),
    "a forward and a backward that needs it are a pair": (join, f"{CIRCLE}|{ASCEND}"),
    "a pair is of one micro-batch": (pair_up(F, B, same=True), "a pair is of two micro-batches"),
    "a pair is of two forwards": (pair_up(F, F), PAIR),
    "a pair is of two backwards": (pair_up(B, B), PAIR),
    "a pair has a weight gradient": (pair_up(F, W), PAIR),
    "a pair begins with its backward": (pair_up(B, F), PAIR),
    "a forward is called a backward": (rename(F, B), f"{NOWHERE}|{TWICE}"),
    "a full backward is called an input gradient": (rename(B, I), "lacks its weight gradient"),
    "an input gradient is called a full backward": (rename(I, B), "is a part of .*, which is computed too"),
    "a weight gradient is called a full backward": (rename(W, B), "is a part of .*, which is computed too"),
    "a full backward is called a weight gradient": (rename(B, W), "lacks its input gradient"),
    "a forward has another micro-batch's number": (renumber("microbatch", lambda i: i - 1 if i else 1, F), NOWHERE),
    "a backward has another micro-batch's number": (
        renumber("microbatch", lambda i: i - 1 if i else 1, B),
        f"{NOWHERE}|{TWICE}|is a part of",
    ),
    "a forward has a stage that is none": (renumber("stage", lambda stage: stage + 1000, F), RANGE),
    "a micro-batch has a number that is none": (renumber("microbatch", lambda i: -1 - i, F, *BACK), RANGE),
    "a stage is missing": (lose("stage"), NOWHERE),
    "a micro-batch is missing": (lose("microbatch"), NOWHERE),
    "a stage of one micro-batch is on a rank of other stages": (scatter, "both compute stage .* not the same stages"),
    "a rank has no work": (rest_one, "there is none; a rank without a stage"),
    "the end of a list is missing": (cut_off, f"{NOWHERE}|a rank without a stage"),
    "a list runs twice": (repeat, TWICE),
    "a list runs backwards": (turn, f"{ORDER}|{PAIR}"),
}


def plant(kind: str, schedule: Schedule, seed: int) -> Schedule | None:
    """The schedule, corrupted; None where there is nothing to corrupt."""
    lists = [list(computes) for computes in schedule.lists]
    if not CORRUPTIONS[kind][0](lists, Random(f"{kind} {schedule.name} {schedule.ranks} {seed}")):  # noqa: S311
        return None
    return Schedule(schedule.name, schedule.ranks, schedule.microbatches, schedule.stages, tuple(map(tuple, lists)))


@pytest.mark.parametrize("schedule", VALID, ids=lambda schedule: f"{schedule.name}-{schedule.ranks}")
def test_what_is_corrupted_was_right(schedule: Schedule) -> None:
    assert len(validate(schedule)) == schedule.ranks
    assert len(run(schedule)) == sum(map(len, schedule.lists))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_is_refused(kind: str) -> None:
    planted = set()
    for schedule in VALID:
        for seed in range(3):
            bad = plant(kind, schedule, seed)
            if bad is None:
                continue
            planted.add(schedule.name)
            with pytest.raises(ValueError) as refused:
                validate(bad)
            message = str(refused.value)
            said = re.match(r'rank (\d+), action (\d+)(?: "([^"]+)")?: ', message)
            assert said, message
            assert re.search(CORRUPTIONS[kind][1], message), message
            rank, place, word = int(said[1]), int(said[2]), said[3]
            assert [str(compute) for compute in bad.lists[rank][place : place + 1]] == [word] * (word is not None)
    assert len(planted) >= 2, f"planted into {planted} only"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", 'rank 0, action 1 "0B0": waits in a circle with "1F1" of rank 1'),
        ("1F0 0F0 1B0 0B0", 'rank 0, action 0 "1F0": waits in a circle with what comes after it in its own list'),
        (
            "0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1\n2F0 2B0 2F1 2B1",
            'rank 0, action 1 "0B0": waits in a circle with "1F1" of rank 1',
        ),
        (
            "0F1&0B0 0F0 0B1\n1F0 1B0 1F1 1B1",
            'rank 0, action 0 "0F1&0B0": needs 0F0 (rank 0, action 1), which comes later',
        ),
        ("0F0 0F1&0B0 0B1\n1F0 1F1&1B0 1B1", 'rank 0, action 1 "0F1&0B0": waits in a circle with "1F1&1B0" of rank 1'),
    ],
)
def test_a_circle_is_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate(parse(text, "mine"))


@pytest.mark.parametrize(
    ("lists", "ranks", "message"),
    [
        ((), 0, "mine has 0 lists for 0 ranks"),
        (((Action(F, 0, 0),),), 2, "mine has 1 lists for 2 ranks"),
        (((),), 1, "rank 0, action 0: 0F0 is computed by no rank, nor is anything else"),
        (((Action(W, 0, 0),),), 1, 'rank 0, action 0 "0W0": 0F0 is computed by no rank'),
    ],
)
def test_lists_that_are_none_are_refused(lists: tuple[tuple[Action, ...], ...], ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(Schedule("mine", ranks, 1, 1, lists))


def test_a_large_number_costs_no_memory() -> None:
    """A slip of the pen asks for 10^14 places; the first that is missing is named, and nothing of that size is made."""
    with pytest.raises(ValueError, match='rank 0, action 0 "0F0": 0F1 is computed by no rank'):
        validate(parse("0F0 0B0 9999999F9999999", "mine"))


def test_copies_may_share_micro_batches_as_they_like() -> None:
    """Two ranks that both hold both stages: each micro-batch takes its own way."""
    schedule = parse("0F0 1F1 1B1 0B0 0F2 1F2 1B2 0B2\n0F1 1F0 1B0 0B1", "mine")
    assert validate(schedule) == (2, 2)
    assert schedule.stage_map.holders_of == ((0, 1), (0, 1))
    with pytest.raises(ValueError, match="waits in a circle"):
        validate(parse("1F1 1B1 0F0 0B0 0F2 1F2 1B2 0B2\n1F0 1B0 0F1 0B1", "mine"))


def test_forwards_alone_are_a_schedule() -> None:
    assert validate(parse("0F0 0F1\n1F0 1F1", "mine")) == (2, 2)
    with pytest.raises(ValueError, match='"0F0": lacks its backward: 0B0 is computed by no rank'):
        validate(parse("0F0 0F1 0B1\n1F0 1F1 1B0 1B1", "mine"))


def test_a_pair_counts_both_its_sides() -> None:
    pair = Overlap(Action(F, 0, 1), Action(B, 0, 0))
    schedule = Schedule("mine", 1, 2, 1, ((Action(F, 0, 0), pair, Action(B, 0, 1)),))
    assert validate(schedule) == (2,)
