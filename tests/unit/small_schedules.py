"""Schedules to test with, and the slow way to run one: an oracle that shares no code with validation or simulation."""

from collections.abc import Iterator

from parallel.pipeline.action import Action, Op, Schedule, parts
from parallel.pipeline.schedules import SCHEDULES, check, generate

RANKS = range(1, 17)
VIRTUAL = range(1, 5)
MICROBATCHES = range(1, 65)
KINDS = [(name, virtual) for name, each in SCHEDULES.items() for virtual in (VIRTUAL if each.virtual else (1,))]


def allowed(name: str, ranks: int, microbatches: int, virtual: int = 1) -> bool:
    """Whether the schedule's rule allows the numbers."""
    try:
        check(name, ranks, microbatches, virtual)
    except ValueError:
        return False
    return True


def sample(name: str, virtual: int) -> Iterator[Schedule]:
    """Every number of ranks with the fewest micro-batches and some that walk through the range; a few with the most."""
    for ranks in RANKS:
        counts = [count for count in MICROBATCHES if allowed(name, ranks, count, virtual)]
        places = {0, (7 * ranks + 3 * virtual) % max(1, len(counts)), len(counts) - 1 if ranks in (2, 7, 12) else 0}
        for place in sorted(places) if counts else ():
            yield generate(name, ranks, counts[place], virtual)


def every(name: str, virtual: int) -> Iterator[Schedule]:
    """The whole range."""
    for ranks in RANKS:
        for count in MICROBATCHES:
            if allowed(name, ranks, count, virtual):
                yield generate(name, ranks, count, virtual)


def needs(action: Action, stages: int) -> list[tuple[str, int, int]]:
    """What must have run before: forwards and input gradients, by (which, stage, micro-batch)."""
    op, stage, microbatch = action
    if op is Op.F:
        return [("forward", stage - 1, microbatch)] if stage else []
    if op is Op.W:
        return [("gradient", stage, microbatch)]
    later = [("gradient", stage + 1, microbatch)] if stage + 1 < stages else []
    return [("forward", stage, microbatch), *later]


def run(schedule: Schedule) -> list[tuple[int, int]]:
    """(rank, place in its list) of all computes in an order in which they can run; less where ranks get stuck."""
    made: set[tuple[str, int, int]] = set()
    heads = [0] * schedule.ranks
    order: list[tuple[int, int]] = []
    moved = True
    while moved:
        moved = False
        for rank, computes in enumerate(schedule.lists):
            while heads[rank] < len(computes):
                actions = parts(computes[heads[rank]])
                if not made.issuperset(need for action in actions for need in needs(action, schedule.stages)):
                    break
                made |= {("forward" if op is Op.F else "gradient", s, i) for op, s, i in actions if op is not Op.W}
                order.append((rank, heads[rank]))
                heads[rank] += 1
                moved = True
    return order
