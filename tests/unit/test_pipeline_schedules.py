"""Every schedule over ranks, virtual stages and micro-batches: complete, in order, where its route says, as drawn."""

import re
from collections import Counter
from collections.abc import Iterator

import pytest
from small_schedules import KINDS, allowed, every, run, sample

from parallel.pipeline.action import Action, Op, Overlap, Schedule, StageMap, held, parts
from parallel.pipeline.schedules import SCHEDULES, Route, check, evaluate, generate
from parallel.pipeline.simulate import simulate
from parallel.pipeline.validate import validate


def flat(schedule: Schedule, rank: int) -> Iterator[Action]:
    return (action for compute in schedule.lists[rank] for action in parts(compute))


def assert_complete(schedule: Schedule) -> None:
    """Each stage of each micro-batch: one F, and one B or one I and one W."""
    counts = Counter(action for rank in range(schedule.ranks) for action in flat(schedule, rank))
    assert set(counts.values()) == {1}
    for stage in range(schedule.stages):
        for i in range(schedule.microbatches):
            ops = {op for op in Op if (op, stage, i) in counts}
            assert ops in ({Op.F, Op.B}, {Op.F, Op.I, Op.W}), (schedule.name, stage, i)
    assert len(counts) == sum(len(list(flat(schedule, rank))) for rank in range(schedule.ranks))
    assert {(a.stage, a.microbatch) for a in counts} == {
        (stage, i) for stage in range(schedule.stages) for i in range(schedule.microbatches)
    }


def assert_placed(schedule: Schedule) -> None:
    """Stages lie where the route of the schedule has them."""
    ranks, route = schedule.ranks, SCHEDULES[schedule.name].placement
    for rank in range(ranks):
        stages = {
            Route.loop: set(range(rank, schedule.stages, ranks)),
            Route.v: {rank, 2 * ranks - 1 - rank},
            Route.bidirectional: {rank, ranks - 1 - rank},
        }[route]
        assert held(schedule.lists[rank]) == stages
        assert set(schedule.stage_map.stages_of(rank)) == stages
    assert len(schedule.stage_map.holders_of) == schedule.stages
    copies = 2 if route is Route.bidirectional else 1
    assert all(len(holders) == copies and list(holders) == sorted(holders) for holders in schedule.stage_map.holders_of)


def assert_ordered(schedule: Schedule) -> None:
    """Ranks do not get stuck; weight gradients of a stage ascend; the peak is the one that validation counts."""
    assert len(run(schedule)) == sum(map(len, schedule.lists)), (schedule.name, schedule.ranks, schedule.microbatches)
    peaks = []
    for rank in range(schedule.ranks):
        last: dict[int, int] = {}
        live, peak = 0, 0
        for op, stage, i in flat(schedule, rank):
            if op in (Op.B, Op.W):
                assert i > last.get(stage, -1)
                last[stage] = i
                live -= 1
            if op is Op.F:
                live += 1
                peak = max(peak, live)
        peaks.append(peak)
        assert live == 0
    assert validate(schedule) == tuple(peaks)


def assert_right(schedule: Schedule) -> None:
    assert_complete(schedule)
    assert_placed(schedule)
    assert_ordered(schedule)


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_schedules_are_right(name: str, virtual: int) -> None:
    seen = 0
    for schedule in sample(name, virtual):
        assert_right(schedule)
        seen += 1
    assert seen >= 15


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_every_schedule_is_right(name: str, virtual: int) -> None:
    for schedule in every(name, virtual):
        assert_right(schedule)


PEAKS = {
    "gpipe": lambda ranks, count: count,
    "1f1b": min,
    "eager_1f1b": lambda ranks, count: min(2 * ranks - 1, count),
    "zb_h1": min,
    "zb_v": lambda ranks, count: min(2 * ranks, 2 * count),
    "dualpipe": lambda ranks, count: ranks + 1,
    "dualpipev": lambda ranks, count: 2 * ranks + 1,
    "eager_dualpipev": lambda ranks, count: min(4 * ranks - 1, 2 * count),
}


@pytest.mark.parametrize("name", PEAKS)
def test_memory_is_what_the_schedule_is_known_for(name: str) -> None:
    for schedule in sample(name, 1):
        assert max(validate(schedule)) == PEAKS[name](schedule.ranks, schedule.microbatches)


def test_split_schedules_balance_memory() -> None:
    assert set(validate(generate("zb_h1", 8, 24))) == {8}
    assert set(validate(generate("zb_v", 8, 24))) == {16}
    assert set(validate(generate("dualpipe", 8, 24))) == {9}


def test_the_forwards_of_1f1b_are_as_few_as_can_be() -> None:
    assert validate(generate("1f1b", 8, 24)) == tuple(range(8, 0, -1))


@pytest.mark.parametrize("name", [name for name in SCHEDULES if "dualpipe" not in name])
def test_the_picture_is_the_schedule(name: str) -> None:
    """What a docstring draws; a picture of one stage a rank leaves the stage out."""
    drawn = re.findall(r"rank (\d+)   (.*)", SCHEDULES[name].function.__doc__ or "")
    lists = {}
    for rank, line in drawn:
        words = [word for word in line.partition("     ")[0].split() if word != ".."]
        lists[int(rank)] = [word if word[0].isdigit() else rank + word for word in words]
    count = 1 + max(int(number) for words in lists.values() for word in words for number in re.findall(r"\d+$", word))
    virtual = 2 if name == "interleaved_1f1b" else 1
    assert lists == {
        rank: list(map(str, computes)) for rank, computes in enumerate(generate(name, len(lists), count, virtual).lists)
    }


def test_dualpipe_has_the_published_phases() -> None:
    """Rank 1 of 8, h = 1, M = 20, written out by hand; way 1 are micro-batches 10 to 19."""
    phases = [
        "1F0 1F1 1F2 1F3",  # 2 (P/2-h-1)
        "1F4 6F10 1F5 6F11",  # h+1
        "6I10 6W10 6F12 6I11 6W11 6F13",  # P/2-h-1
        "1F6&6B12 6F14&1B0 1F7&6B13 6F15&1B1 1F8&6B14 6F16&1B2 1F9&6B15 6F17&1B3",  # M/2-P+h+1
        "6B16 6F18&1B4 6B17 6F19&1B5",  # P/2-h-1
        "6B18 1B6 6I19 1I7",  # h+1, input gradients only from i = 1 on
        "6W19 1I8 1W7 1I9",  # P/2-h-1
        "1W8 1W9",  # h+1
    ]
    lists = generate("dualpipe", 8, 20).lists
    assert " ".join(map(str, lists[1])) == " ".join(phases)
    other = re.sub(r"([FBIW])(\d+)", lambda match: f"{match[1]}{(int(match[2]) + 10) % 20}", " ".join(phases))
    assert " ".join(map(str, lists[6])) == other, "its mirror does the same with the other half of the micro-batches"


def test_the_middle_of_dualpipe_does_not_overlap_its_first_pair() -> None:
    lists = generate("dualpipe", 8, 20).lists
    for rank, computes in enumerate(lists):
        first = next(place for place, compute in enumerate(computes) if isinstance(compute, Overlap))
        alone = isinstance(computes[first - 1], Action) and computes[first - 1].op is Op.B  # type: ignore[union-attr]
        assert alone == (rank in (3, 4))


def test_dualpipev_is_half_of_dualpipe() -> None:
    """Rank r of 4 does what rank r of 8 does, with the same micro-batches both ways."""
    whole, half = generate("dualpipe", 8, 20).lists[:4], generate("dualpipev", 4, 10).lists
    for one, other in zip(whole, half, strict=True):
        assert [re.sub(r"([FBIW])1(\d)", r"\1\2", str(compute)) for compute in one] == list(map(str, other))


def test_one_rank_accumulates() -> None:
    assert " ".join(map(str, generate("1f1b", 1, 3).lists[0])) == "0F0 0B0 0F1 0B1 0F2 0B2"
    assert " ".join(map(str, generate("interleaved_1f1b_overlap", 1, 3).lists[0])) == "0F0 0F1&0B0 0F2&0B1 0B2"


@pytest.mark.parametrize("name", ["interleaved_1f1b", "interleaved_1f1b_overlap"])
def test_rounds_of_any_length_keep_the_bubble(name: str) -> None:
    """(P-1)(F+B), F and B being those of one of a rank's stages, also where ranks do not divide micro-batches."""
    for ranks, count in ((2, 3), (3, 3), (4, 7), (5, 12), (8, 17), (6, 33)):
        for virtual in range(1, 5):
            timeline = simulate(generate(name, ranks, count, virtual))
            assert set(timeline.bubbles) == {3 * (ranks - 1)}


def test_overlap_is_the_steady_state() -> None:
    """All forwards but those of the start are in pairs, and each pair is of two micro-batches."""
    for virtual in (1, 2, 3):
        schedule = generate("interleaved_1f1b_overlap", 4, 32, virtual)
        for rank, computes in enumerate(schedule.lists):
            pairs = [compute for compute in computes if isinstance(compute, Overlap)]
            assert len(pairs) == 32 * virtual - (2 * (3 - rank) + (virtual - 1) * 4 + 1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_evaluation_runs_wherever_stages_lie(name: str, microbatches: int) -> None:
    stage_map = generate(name, 4, 16).stage_map
    schedule = evaluate(stage_map, microbatches)
    actions = [action for rank in range(schedule.ranks) for action in flat(schedule, rank)]
    assert sorted(actions) == [
        Action(Op.F, s, i) for s in range(len(stage_map.holders_of)) for i in range(microbatches)
    ]
    assert all(rank in stage_map.holders_of[a.stage] for rank in range(4) for a in flat(schedule, rank))
    assert len(run(schedule)) == len(actions) and schedule.ranks == 4
    assert max(validate(schedule)) == max(map(len, schedule.lists))
    if microbatches > 1:
        assert all(schedule.lists), "copies of stages share the work"


def test_evaluation_is_as_short_as_the_pipeline() -> None:
    """A wave: rank r of a single loop goes through the micro-batches in order, and so do both of its stages."""
    schedule = evaluate(StageMap(((0,), (1,), (1,), (0,))), 3)
    assert " ".join(map(str, schedule.lists[0])) == "0F0 0F1 0F2 3F0 3F1 3F2"
    assert " ".join(map(str, schedule.lists[1])) == "1F0 1F1 2F0 1F2 2F1 2F2"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (("1f1bb", 4, 8), "parallel.pipeline.schedule=1f1bb must be one of gpipe, 1f1b, eager_1f1b, interleaved_1f1b,"),
        (("1f1b", 0, 8), "parallel.pp=0 must be at least 1"),
        (("1f1b", 4, 0), "micro-batches=0 must be at least 1"),
        (("interleaved_1f1b", 4, 8, 0), "parallel.pipeline.virtual=0 must be at least 1"),
        (("1f1b", 4, 8, 2), "parallel.pipeline.virtual=2 must be 1 for .*=1f1b.*take interleaved_1f1b"),
        (("zb_v", 4, 8, 2), "parallel.pipeline.virtual=2 must be 1 for .*=zb_v, which has 2 stages a rank"),
        (("dualpipe", 5, 20), "parallel.pp=5 must be even.*take dualpipev, or parallel.pp=6"),
        (("dualpipe", 4, 9), "micro-batches=9 must be even.*half of them for each direction: change run.micro_batch"),
        (("dualpipe", 8, 14), r"micro-batches=14 must be at least 2 \* parallel.pp = 16 .*=dualpipe: lower"),
        (("dualpipev", 3, 5), r"micro-batches=5 must be at least 2 \* parallel.pp = 6 .*=dualpipev: lower"),
    ],
)
def test_rules_are_told(numbers: tuple[str, int, int], message: str) -> None:
    for refuse in (check, generate):
        with pytest.raises(ValueError, match=message):
            refuse(*numbers)


def test_rules_refuse_no_more_than_they_say() -> None:
    """All but the two DualPipes take any numbers."""
    for name, virtual in KINDS:
        for ranks in range(1, 9):
            for count in range(1, 33):
                wanted = {
                    "dualpipe": ranks % 2 == 0 and count % 2 == 0 and count >= 2 * ranks,
                    "dualpipev": count >= 2 * ranks,
                }.get(name, True)
                assert allowed(name, ranks, count, virtual) == wanted
