"""Simulated times: equal to published formulas and to a clock that ticks; integers stay exact; who waits is named."""

import random
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise, product

import pytest

from parallel.pipeline.action import Action, Compute, Op, Overlap, Schedule, parts
from parallel.pipeline.schedules import SCHEDULES, generate
from parallel.pipeline.simulate import Cost, simulate, stretch
from parallel.pipeline.text import parse

F, B, I, W = Op
NAMES = tuple(SCHEDULES)


def tick(schedule: Schedule, cost: Cost) -> dict[tuple[int, int], tuple[int, int]]:
    """(rank, action) -> (start, end), by a clock that ticks: an idle rank starts what it can."""
    cost_of = {F: cost.F, B: cost.B, I: cost.I, W: cost.W}
    ran: dict[tuple[int, int], tuple[int, int]] = {}
    arrives: dict[tuple[str, int, int], dict[int, int]] = {}  # what was made -> rank -> when it can be read there
    head, free, now = [0] * schedule.ranks, [0] * schedule.ranks, 0
    while len(ran) < sum(map(len, schedule.lists)):
        for rank, computes in enumerate(schedule.lists):
            if free[rank] > now or head[rank] == len(computes):
                continue
            compute = computes[head[rank]]
            actions = parts(compute)
            inputs = [key for action in actions for key in read_by(action, schedule.stages)]
            if any(arrives.get(key, {}).get(rank, now + 1) > now for key in inputs):
                continue
            long = cost_of[actions[0].op]
            if len(actions) == 2:
                long = cost.pair if actions[1].op is B else cost.pair - cost.B + cost.I
            free[rank] = now + long
            ran[rank, head[rank]] = now, now + long
            head[rank] += 1
            for action in actions:
                if action.op is not W:
                    key = ("made" if action.op is F else "back", action.stage, action.microbatch)
                    arrives[key] = {r: free[rank] + cost.send * (r != rank) for r in range(schedule.ranks)}
        now += 1
        if now > 10_000:
            raise TimeoutError
    return ran


def read_by(action: Action, stages: int) -> list[tuple[str, int, int]]:
    op, stage, i = action
    if op is F:
        return [("made", stage - 1, i)] if stage else []
    if op is W:
        return [("back", stage, i)]
    return [("made", stage, i)] + ([("back", stage + 1, i)] if stage < stages - 1 else [])


def draw_schedule(seed: int) -> Schedule:
    """A schedule of no name: stages anywhere, copies of some, backwards split or not, pairs where they fit."""
    rng = random.Random(seed)  # noqa: S311
    ranks, stages, microbatches = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 5)
    homes = [rng.choices(range(ranks), k=rng.choice((1, 1, 2))) for _ in range(stages)]
    rank_of = {(stage, i): rng.choice(homes[stage]) for stage, i in product(range(stages), range(microbatches))}
    columns = []
    for i in range(microbatches):
        column = [Action(F, stage, i) for stage in range(stages)]
        for stage in reversed(range(stages)):
            column += [Action(B, stage, i)] if rng.random() < 0.5 else [Action(I, stage, i), Action(W, stage, i)]
        columns.append(column)
    lists: list[list[Compute]] = [[] for _ in range(ranks)]
    while any(columns):  # a random order in which every action comes after what it reads
        action = rng.choice([column for column in columns if column]).pop(0)
        mine = lists[rank_of[action.stage, action.microbatch]]
        last = mine[-1] if mine else None
        if (
            isinstance(last, Action)
            and {last.op, action.op} in ({F, B}, {F, I})
            and last.microbatch != action.microbatch
            and rng.random() < 0.5
        ):
            mine[-1] = Overlap(*sorted((last, action), key=lambda part: part.op is not F))
        else:
            mine.append(action)
    return Schedule(f"drawn {seed}", ranks, microbatches, stages, tuple(map(tuple, lists)))


def draw_cost(seed: int) -> Cost:
    rng = random.Random(seed)  # noqa: S311
    f, i, w = (rng.randint(1, 4) for _ in range(3))
    b = rng.randint(max(i, w), i + w)
    return Cost(F=f, B=b, I=i, W=w, FB=rng.randint(max(f, b), f + b), send=rng.choice((0, 0, 1, 3)))


def times(schedule: Schedule, cost: Cost) -> dict[tuple[int, int], tuple[int, int]]:
    timeline = simulate(schedule, cost)
    pairs = zip(timeline.starts.tolist(), timeline.ends.tolist(), strict=True)
    return {(rank, slot): next(pairs) for rank, computes in enumerate(schedule.lists) for slot in range(len(computes))}


def test_a_ticking_clock_agrees_on_schedules_of_no_name() -> None:
    stuck = 0
    for seed in range(300):
        schedule, cost = draw_schedule(seed), draw_cost(seed)
        try:
            expected = tick(schedule, cost)
        except TimeoutError:  # a pair may join what another rank keeps apart
            stuck += 1
            with pytest.raises(ValueError, match=r"^rank \d+, action \d+ \".*\": waits in a circle with .+"):
                simulate(schedule, cost)
            continue
        assert times(schedule, cost) == expected, schedule
    assert 0 < stuck < 100


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_ticking_clock_agrees_on_every_schedule(name: str) -> None:
    for seed, (ranks, rounds) in enumerate(product((2, 4, 6), (2, 3))):
        schedule = generate(name, ranks, ranks * rounds, 2 if SCHEDULES[name].virtual else 1)
        for cost in (Cost(), Cost(F=2, I=2, W=2, B=4, FB=6, send=1), draw_cost(seed), draw_cost(seed + 50)):
            assert times(schedule, cost) == tick(schedule, cost)


def test_measured_durations_take_the_place_of_costs() -> None:
    """The same where they are the costs; and one action that takes longer moves what comes after it, and no other."""
    for name in SCHEDULES:
        schedule, cost = generate(name, 4, 8), draw_cost(3)
        plain = simulate(schedule, cost)
        durations = (plain.ends - plain.starts).tolist()
        again = simulate(schedule, cost, durations)
        assert (again.starts == plain.starts).all() and (again.ends == plain.ends).all()
        assert again.busy == pytest.approx(plain.busy) and again.spans == pytest.approx(plain.spans)
        last = int(plain.ends.argmax())
        durations[last] += 7
        longer = simulate(schedule, cost, durations)
        assert longer.makespan == plain.makespan + 7
        assert (longer.starts == plain.starts).all()
        rank = int(plain.table.ranks()[last])
        assert longer.bubbles[rank] == plain.bubbles[rank]


def test_stages_of_different_weight() -> None:
    """0F 2, 1F 8 twice, 1B 16, 0B 4: the second rank is never without work between its first and its last."""
    schedule = parse("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1", "mine")
    timeline = simulate(schedule, durations=stretch(schedule, Cost(F=2, B=4), [1.0, 4.0]))
    assert timeline.starts.tolist() == [0, 2, 26, 50, 2, 10, 26, 34]
    assert timeline.makespan == 54 and timeline.busy == (12, 48) and timeline.bubbles == (42, 6)
    for name in SCHEDULES:
        schedule, cost = generate(name, 4, 8), draw_cost(5)
        plain = simulate(schedule, cost)
        even = simulate(schedule, cost, stretch(schedule, cost, [1.0] * schedule.stages))
        assert even.ends.tolist() == pytest.approx(plain.ends.tolist())


def test_a_pair_weighs_as_its_sides_do() -> None:
    pair = Schedule("pair", 1, 2, 1, ((Action(F, 0, 0), Overlap(Action(F, 0, 1), Action(B, 0, 0)), Action(B, 0, 1)),))
    assert stretch(pair, Cost(F=1, B=3, FB=2 + 1), [2.0]) == [2, 6, 6]
    two = Schedule("two", 1, 1, 2, ((Overlap(Action(F, 0, 0), Action(I, 1, 0)),),))
    # F and I cost 1 and 1, the pair 3 - 2 + 1 = 2: times the mean of 1 and 3.
    assert stretch(two, Cost(F=1, B=2, I=1, W=1, FB=3), [1.0, 3.0]) == [4]


EVEN = [Cost(F=unit, I=unit, W=unit, B=2 * unit, FB=3 * unit) for unit in (1, 7)]
UNEVEN = [Cost(F=4, I=4, W=w, B=4 + w, FB=fb) for w, fb in ((1, 5), (1, 9), (3, 8), (3, 13))]
LOPSIDED = [Cost(F=3, I=5, W=2, B=7), Cost(F=5, I=2, W=2, B=4), Cost(F=9, I=8, W=7, B=15, FB=20)]
SIZES = [(ranks, count) for ranks in range(1, 17) for count in {1, 2, ranks, 2 * ranks + 2, 64}]


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "eager_1f1b"])
def test_bubble_and_memory_of_full_backwards(name: str) -> None:
    """(P-1)(F+B) on every rank, whatever the costs; 1F1B keeps P - rank micro-batches, or as many more, GPipe all."""
    for (ranks, count), cost in product(SIZES, EVEN + UNEVEN[:2] + LOPSIDED):
        timeline = simulate(generate(name, ranks, count), cost)
        assert timeline.bubbles == ((ranks - 1) * (cost.F + cost.B),) * ranks
        assert timeline.makespan == (ranks - 1 + count) * (cost.F + cost.B)
        ahead = {"gpipe": [count] * ranks, "1f1b": range(ranks, 0, -1), "eager_1f1b": range(2 * ranks - 1, 0, -2)}
        assert timeline.peaks == tuple(min(number, count) for number in ahead[name])


def test_bubble_and_memory_of_zb_h1() -> None:
    """(P-1)(F+B-2W) where W is at most F and at most I, and P micro-batches alive."""
    for (ranks, count), cost in product(SIZES, EVEN + UNEVEN[:2] + LOPSIDED):
        if count >= ranks:
            timeline = simulate(generate("zb_h1", ranks, count), cost)
            assert timeline.bubbles == ((ranks - 1) * (cost.F + cost.B - 2 * cost.W),) * ranks
            assert max(timeline.peaks) == ranks


@pytest.mark.parametrize(("name", "half", "alive"), [("dualpipe", 2, 1), ("dualpipev", 1, 2)])
def test_bubble_and_memory_of_dualpipe(name: str, half: int, alive: int) -> None:
    """(P/2-1)(F&B+B-3W) and P + 1 alive; DualPipeV: P for P/2, and 2P + 1 halves. For F = I and W at most F.

    Where a pair takes as long as its sides, every rank has this bubble; else the middle ranks, with most pairs, do.
    """
    for ranks, cost in product(range(half, 17, half), EVEN + UNEVEN):
        for count in {2 * ranks, 2 * ranks + 2, 64}:
            timeline = simulate(generate(name, ranks, count), cost)
            bubble = (ranks // half - 1) * (cost.pair + cost.B - 3 * cost.W)
            middle = timeline.bubbles[ranks // 2 if half == 2 else -1]
            assert middle == bubble
            assert cost.pair != cost.F + cost.B or set(timeline.bubbles) == {bubble}
            assert max(timeline.peaks) == alive * ranks + 1


@pytest.mark.parametrize(("prompt", "eager"), [("1f1b", "eager_1f1b"), ("dualpipev", "eager_dualpipev")])
def test_a_message_has_a_turn_in_eager_schedules(prompt: str, eager: str) -> None:
    """Messages as long as a forward cost as many as lie on the way there and back, not one a micro-batch."""
    for ranks, count in product(range(2, 9), (32, 64)):
        lost = {}
        for name in (prompt, eager):
            schedule = generate(name, ranks, count)
            linked, plain = (simulate(schedule, replace(EVEN[1], send=send)).makespan for send in (EVEN[1].F, 0))
            lost[name] = (linked - plain) / EVEN[1].F
        assert lost[prompt] >= count / 2 and lost[eager] <= 4 * ranks


def test_the_bubble_of_eager_dualpipev() -> None:
    """(P-1)F with F = I = W."""
    for ranks, cost in product(range(1, 17), EVEN):
        for count in (4 * ranks, 64):
            timeline = simulate(generate("eager_dualpipev", ranks, count), cost)
            assert set(timeline.bubbles) == {(ranks - 1) * cost.F}


def test_both_bubbles_of_zb_v() -> None:
    """With F = I = W: nothing on a rank's own span; (P-1)F of the step, which ends when the last rank does."""
    for ranks, cost in product(range(1, 17), EVEN):
        for count in {2 * ranks - 1, 2 * ranks, 64}:
            timeline = simulate(generate("zb_v", ranks, count), cost)
            assert timeline.gaps == (0,) * ranks
            assert timeline.bubbles == ((ranks - 1) * cost.F,) * ranks
            assert max(timeline.peaks) == 2 * ranks


def test_bubble_of_virtual_stages() -> None:
    """v stages a rank, each a v-th as long: the bubble is (P-1)(F+B) of one of them."""
    for ranks, virtual, count in product((1, 2, 5, 8), (1, 2, 3, 4), (8, 9, 11, 16, 23)):
        timeline = simulate(generate("interleaved_1f1b", ranks, count, virtual), Cost(F=5, B=9))
        assert timeline.bubbles == ((ranks - 1) * 14,) * ranks


def test_memory_is_what_a_count_by_hand_gives() -> None:
    for name in NAMES:
        schedule = generate(name, 4, 12)
        for rank, computes in enumerate(schedule.lists):
            alive, most = 0, 0
            for compute in computes:
                ops = [action.op for action in parts(compute)]
                alive += F in ops
                most = max(most, alive)
                alive -= B in ops or W in ops
            assert alive == 0 and simulate(schedule).peaks[rank] == most


def test_numbers_stay_what_they_are() -> None:
    schedule = generate("zb_h1", 3, 5)
    assert [type(number) for number in simulate(schedule).bubbles] == [int] * 3
    third = simulate(schedule, Cost(F=Fraction(1, 3), B=Fraction(2, 3), I=Fraction(1, 3), W=Fraction(1, 3)))
    assert third.makespan == Fraction(simulate(schedule).makespan, 3) and third.bubbles == (Fraction(2, 3),) * 3
    huge = 10**30
    assert simulate(schedule, Cost(F=huge, B=2 * huge, I=huge, W=huge)).bubbles == (2 * huge,) * 3
    assert simulate(schedule, Cost(F=0.5, B=1, I=0.5, W=0.5)).makespan == simulate(schedule).makespan / 2


def test_a_link_takes_its_time_and_nobody_waits_for_it_but_the_reader() -> None:
    schedule = generate("gpipe", 3, 4)
    plain, linked = simulate(schedule), simulate(schedule, Cost(send=10))
    assert linked.makespan == plain.makespan + 4 * 10, "two links there, two back; messages do not queue"
    assert linked.spans[2] == plain.spans[2], "the last rank gets a micro-batch as often as before"
    assert simulate(generate("gpipe", 1, 4), Cost(send=10)).makespan == 12, "nothing is sent on one rank"


def test_rows_are_the_lists_with_times() -> None:
    schedule = generate("dualpipev", 2, 4)
    rows = list(simulate(schedule).rows([1], 1e-3))
    assert tuple(row.action for row in rows) == schedule.lists[1]
    assert {row.rank for row in rows} == {1} and rows[0].start == 0.001 and rows[0].end == 0.002
    assert all(row.end <= after.start for row, after in pairwise(rows))


def test_ranks_that_wait_for_each_other_are_named() -> None:
    lists = ((Action(B, 0, 0), Action(F, 0, 0)), (Action(F, 1, 0), Action(B, 1, 0)))
    with pytest.raises(ValueError, match=r'^rank 0, action 0 "0B0": waits in a circle with "1F0" of rank 1$'):
        simulate(Schedule("stuck", 2, 1, 2, lists))
    with pytest.raises(ValueError, match=r'^rank 0, action 1 "0W0": waits in a circle with what comes after it'):
        simulate(Schedule("early", 1, 1, 1, ((Action(F, 0, 0), Action(W, 0, 0), Action(I, 0, 0)),)))


def test_what_nobody_computes_is_named() -> None:
    with pytest.raises(ValueError, match=r'^rank 0, action 1 "1F0": needs what no rank computes$'):
        simulate(Schedule("gap", 1, 2, 2, ((Action(F, 0, 1), Action(F, 1, 0)),)))


@pytest.mark.parametrize("action", [Action(F, 2, 0), Action(F, -1, 0), Action(B, 0, 3), Action(W, 1, -1)])
def test_numbers_out_of_range_are_named(action: Action) -> None:
    lists = ((Action(F, 0, 0), Overlap(Action(F, 0, 1), action)),)
    with pytest.raises(ValueError, match=rf'^rank 0, action 1 "0F1&{action}": there are stages 0 to 1 and'):
        simulate(Schedule("beyond", 1, 3, 2, lists))


def test_a_schedule_without_actions_takes_no_time() -> None:
    timeline = simulate(Schedule("nothing", 2, 1, 2, ((), ())))
    assert (timeline.makespan, timeline.bubbles, timeline.spans, timeline.peaks) == (0, (0, 0), (0, 0), (0, 0))


@pytest.mark.parametrize("name", ["F", "B", "I", "W"])
def test_costs_are_positive(name: str) -> None:
    for value in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=rf"^cost\.{name}={value} must be positive"):
            Cost(**{name: value})


def test_costs_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^cost\.send=-1 must not be negative"):
        Cost(send=-1)
    with pytest.raises(ValueError, match=r"^cost\.FB=3 must be at least cost\.F=1 and cost\.B=4"):
        Cost(B=4, FB=3)
