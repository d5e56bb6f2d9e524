"""Programs: complete and free of deadlock, early and batched as they say; every kind of corruption is refused."""

import re
from itertools import islice
from random import Random

import pytest
from corrupt_programs import (
    Corrupt,
    change,
    double,
    drop_both,
    drop_compute,
    drop_end,
    early,
    greedy,
    late,
    other_end,
    redirect,
    relabel,
    rename,
    swap,
    swap_computes,
    swap_steps,
    turn,
)
from small_schedules import KINDS, every, needs, sample

import parallel.pipeline.lower
from parallel.pipeline.action import Schedule, parts
from parallel.pipeline.lower import Exchange, Kind, Program, Transfer, What, lower
from parallel.pipeline.prove import prove
from parallel.pipeline.schedules import evaluate, generate
from parallel.pipeline.simulate import simulate
from parallel.pipeline.text import parse


def tensor(transfer: Transfer) -> tuple[str, int, int]:
    """A transfer's tensor as ``needs`` names it."""
    return "forward" if transfer.what is What.activation else "gradient", transfer.stage, transfer.microbatch


def assert_runs(program: Program) -> None:
    """Rendezvous, slowly: an exchange ends when all its peers have posted the other ends, and nobody goes on before.

    Each rank has only what it made or received; both ends take what is between them in the same order.
    """
    heads = [0] * len(program.lists)
    has: list[set[tuple[str, int, int]]] = [set() for _ in program.lists]
    posted: set[tuple[int, Transfer]] = set()
    stages, moved = program.schedule.stages, True
    while moved:
        moved = False
        for rank, steps in enumerate(program.lists):
            while heads[rank] < len(steps):
                step = steps[heads[rank]]
                if isinstance(step, Exchange):
                    posted |= {(rank, transfer) for transfer in step.transfers}
                    if not all((each.peer, other_end(each, rank)) in posted for each in step.transfers):
                        break
                    assert all(tensor(each) in has[rank] for each in step.transfers if each.kind is Kind.send)
                    has[rank] |= {tensor(each) for each in step.transfers}
                else:
                    assert has[rank].issuperset(need for action in parts(step) for need in needs(action, stages))
                    has[rank] |= {
                        ("forward" if a.op == "F" else "gradient", *a[1:]) for a in parts(step) if a.op != "W"
                    }
                heads[rank] += 1
                moved = True
    assert heads == list(map(len, program.lists)), "ranks wait in a circle"
    for rank in range(len(heads)):
        for peer in range(rank):
            here = [each for each in transfers(program, rank) if each.peer == peer]
            assert [other_end(each, rank) for each in here] == [e for e in transfers(program, peer) if e.peer == rank]


def transfers(program: Program, rank: int) -> list[Transfer]:
    return [each for step in program.lists[rank] if isinstance(step, Exchange) for each in step.transfers]


def assert_lean(program: Program) -> None:
    """The schedule's own lists; a transfer for each neighbour on another rank, and no other."""
    schedule = program.schedule
    computes = [tuple(step for step in steps if not isinstance(step, Exchange)) for steps in program.lists]
    assert tuple(computes) == schedule.lists
    where = {a[1:]: rank for rank, each in enumerate(schedule.lists) for compute in each for a in parts(compute)}
    crossings = [
        where[s, i] != where[s + 1, i] for s in range(schedule.stages - 1) for i in range(schedule.microbatches)
    ]
    backward = any(a.op != "F" for compute in schedule.lists[0] for a in parts(compute))
    count = sum(len(transfers(program, rank)) for rank in range(schedule.ranks))
    assert count == 2 * sum(crossings) * (1 + backward)


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_programs_run_under_rendezvous(name: str, virtual: int) -> None:
    for place, schedule in enumerate(sample(name, virtual)):
        if place % 2 == virtual % 2 and sum(map(len, schedule.lists)) < 700:
            program = lower(schedule)
            prove(program)
            assert_runs(program)
            assert_lean(program)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_every_third_program_is_proved(name: str, virtual: int) -> None:
    for schedule in islice(every(name, virtual), virtual % 3, None, 3):  # each count is drawn, with some of the ranks
        prove(lower(schedule))


def test_evaluation_is_lowered_too() -> None:
    for name, virtual in KINDS:
        program = lower(evaluate(generate(name, 4, 8, virtual).stage_map, 5))
        prove(program)
        assert_runs(program)
        assert_lean(program)


def test_the_picture_is_the_program() -> None:
    drawn = re.findall(r"rank \d   (.*)", parallel.pipeline.lower.__doc__ or "")
    assert [" ".join(map(str, steps)) for steps in lower(generate("1f1b", 2, 3)).lists] == drawn


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_exchanges_are_where_their_moment_is(name: str, virtual: int) -> None:
    """Behind all that a rank has finished by then and before the rest; what travels at one moment is one exchange."""
    schedule = generate(name, 4, 8, virtual)
    timeline = simulate(schedule)
    ends = {}
    for rank, computes in enumerate(schedule.lists):
        for place, compute in enumerate(computes):
            end = int(timeline.ends[int(timeline.table.offsets[rank]) + place])
            ends |= {(rank, place): end} | {
                (a.stage, a.microbatch, a.op == "F"): end for a in parts(compute) if a.op != "W"
            }
    for rank, steps in enumerate(lower(schedule).lists):
        over, last = 0, -1
        for step in steps:
            if not isinstance(step, Exchange):
                over += 1
                continue
            (moment,) = {ends[each.stage, each.microbatch, each.what is What.activation] for each in step.transfers}
            assert moment > last, "one exchange a moment"
            assert over == sum(ends[rank, place] <= moment for place in range(len(schedule.lists[rank])))
            last = moment


def test_crossing_pairs_are_one_exchange() -> None:
    """In the steady state of 1F1B a rank sends forward what its peer sends back for."""
    steps = lower(generate("1f1b", 4, 16)).lists[2]
    both = [step for step in steps if isinstance(step, Exchange) and len({each.peer for each in step.transfers}) == 1]
    assert sum({each.kind for each in step.transfers} == set(Kind) for step in both) >= 20


TRAVELS, UNPAIRED = "goes from rank|need not travel", "is not what rank .* has|has no other end"
THERE = "is not there to be sent|is received twice"
CORRUPTIONS: dict[str, tuple[Corrupt, str]] = {
    "a send is dropped": (drop_end(Kind.send), "is never sent"),
    "a receive is dropped": (drop_end(Kind.receive), "has not been received"),
    "a transfer is dropped on both ends": (drop_both, "has not been received|is never sent"),
    "a transfer is there twice": (change(double), THERE),
    "a transfer goes to another rank": (change(redirect), TRAVELS),
    "a send is a receive": (change(turn), TRAVELS),
    "a transfer has another stage": (change(rename), f"{TRAVELS}|{THERE}"),
    "an activation is called a gradient": (change(relabel), f"{TRAVELS}|{THERE}"),
    "the two transfers of an exchange have changed places": (change(swap, least=2), UNPAIRED),
    "two exchanges have changed places": (swap_steps, f"{UNPAIRED}|{THERE}|has not been received|never"),
    "a receive comes too late": (late, "has not been received|never"),
    "a send comes too early": (early, "is not there to be sent"),
    "a receive waits for what needs a later send": (greedy, "waits in a circle of exchanges"),
    "two actions have changed places": (swap_computes, "the schedule has"),
    "an action is missing": (drop_compute, "the schedule has|is missing"),
}
VALID = [
    generate("1f1b", 3, 5),
    generate("interleaved_1f1b", 3, 6, 2),
    generate("interleaved_1f1b", 4, 6, 3),
    generate("interleaved_1f1b_overlap", 4, 8, 2),
    generate("zb_h1", 4, 6),
    generate("zb_v", 3, 6),
    generate("dualpipe", 4, 8),
    generate("dualpipev", 3, 6),
]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_corruption_is_refused(kind: str) -> None:
    corrupt, reason = CORRUPTIONS[kind]
    planted = set()
    for schedule in VALID:
        program = lower(schedule)
        for seed in range(4):
            lists = [list(steps) for steps in program.lists]
            if not corrupt(lists, Random(f"{kind} {schedule.name} {seed}")):  # noqa: S311
                continue
            planted.add(schedule.name)
            with pytest.raises(ValueError, match=reason) as refused:
                prove(Program(schedule, tuple(map(tuple, lists))))
            said = re.match(r"rank (\d+), step (\d+)(?: '([^']+)')?: ", str(refused.value))
            assert said, str(refused.value)
            assert [str(step) for step in lists[int(said[1])][int(said[2]) :][:1]] == [said[3]] * (said[3] is not None)
    assert len(planted) >= 2, f"planted into {planted} only"


def test_programs_of_other_ranks_are_refused() -> None:
    program = lower(generate("1f1b", 2, 3))
    with pytest.raises(ValueError, match="1f1b has 1 programs for 2 ranks"):
        prove(Program(program.schedule, program.lists[:1]))


def test_a_circle_is_not_lowered() -> None:
    schedule: Schedule = parse("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1", "mine")
    with pytest.raises(ValueError, match=r"rank 0, action 1 .0B0.* waits"):
        lower(schedule)
