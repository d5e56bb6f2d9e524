"""Ways to corrupt a schedule: each takes the lists of a valid one and changes them in place.

It says False where the schedule has nothing to corrupt so.
"""

from collections.abc import Callable
from random import Random

from parallel.pipeline.action import Action, Compute, Op, Overlap, parts

F, B, I, W = Op
BACK = (B, I)
Lists = list[list[Compute]]
Corrupt = Callable[[Lists, Random], bool]


def find(lists: Lists, action: Action) -> tuple[int, int]:
    """Rank and place of an action, also within a pair."""
    return next(
        (rank, place)
        for rank, computes in enumerate(lists)
        for place, compute in enumerate(computes)
        if action in parts(compute)
    )


def choose(lists: Lists, random: Random, *ops: Op) -> Action | None:
    """One of the actions of these kinds."""
    found = [action for computes in lists for compute in computes for action in parts(compute) if action.op in ops]
    return random.choice(found) if found else None


def drop(lists: Lists, action: Action) -> tuple[int, int]:
    """Take an action out, leaving the other half of a pair; where it was."""
    rank, place = find(lists, action)
    lists[rank][place : place + 1] = [other for other in parts(lists[rank][place]) if other != action]
    return rank, place


def other_rank(lists: Lists, random: Random, rank: int) -> int:
    return random.choice([other for other in range(len(lists)) if other != rank])


def backward(lists: Lists, stage: int, microbatch: int) -> Action:
    """The B or the I of a stage."""
    every = {action for computes in lists for compute in computes for action in parts(compute)}
    return next(Action(op, stage, microbatch) for op in BACK if Action(op, stage, microbatch) in every)


def drop_one(*ops: Op) -> Corrupt:
    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, *ops)
        return action is not None and bool(drop(lists, action))

    return corrupt


def double_one(*ops: Op, elsewhere: bool = False) -> Corrupt:
    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, *ops)
        if action is None or (elsewhere and len(lists) == 1):
            return False
        rank, place = find(lists, action)
        into = lists[other_rank(lists, random, rank) if elsewhere else rank]
        into.insert(random.randint(0 if elsewhere else place + 1, len(into)), action)
        return True

    return corrupt


def move_one(*ops: Op) -> Corrupt:
    """To a rank that does not do the rest of its stage and micro-batch."""

    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, *ops)
        if action is None or len(lists) == 1:
            return False
        rank, _ = drop(lists, action)
        into = lists[other_rank(lists, random, rank)]
        into.insert(random.randint(0, len(into)), action)
        return True

    return corrupt


def reorder(op: Op, before: Op) -> Corrupt:
    """Of one stage and micro-batch, ``op`` right before what it needs."""

    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, op)
        if action is None:
            return False
        drop(lists, action)
        rank, place = find(lists, action._replace(op=before))
        lists[rank].insert(place, action)
        return True

    return corrupt


def rename(op: Op, to: Op) -> Corrupt:
    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, op)
        if action is None:
            return False
        rank, place = drop(lists, action)
        lists[rank].insert(place, action._replace(op=to))
        return True

    return corrupt


def renumber(field: str, change: Callable[[int], int], *ops: Op) -> Corrupt:
    """An action gets another stage or micro-batch."""

    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, *ops)
        if action is None:
            return False
        rank, place = drop(lists, action)
        lists[rank].insert(place, action._replace(**{field: change(getattr(action, field))}))
        return True

    return corrupt


def swap_weights(lists: Lists, random: Random) -> bool:
    """Two weight gradients of a stage on a rank change places, and nothing else."""
    action = choose(lists, random, W)
    if action is None:
        return False
    rank, place = find(lists, action)
    same = [p for p, c in enumerate(lists[rank]) if isinstance(c, Action) and c[:2] == action[:2] and p != place]
    if not same:
        return False
    other = random.choice(same)
    lists[rank][place], lists[rank][other] = lists[rank][other], lists[rank][place]
    return True


def swap_backwards(lists: Lists, random: Random) -> bool:
    """Two full backwards of a stage on a rank change places."""
    action = choose(lists, random, B)
    if action is None:
        return False
    rank, _ = find(lists, action)
    same = [a for c in lists[rank] for a in parts(c) if a[:2] == action[:2] and a != action]
    if not same:
        return False
    other = random.choice(same)
    swapped = {action: other, other: action}
    lists[rank] = [
        Overlap(*(swapped.get(a, a) for a in c)) if isinstance(c, Overlap) else swapped.get(c, c) for c in lists[rank]
    ]
    return True


def corner(lists: Lists, random: Random) -> tuple[Action, Action] | None:
    """A forward and a backward of two micro-batches on a rank, the forward first, that must stay in this order.

    The stage after theirs is on another rank, which runs its forward of the one before its backward of the other.
    """
    stages = 1 + max(action.stage for computes in lists for compute in computes for action in parts(compute))
    found = []
    for computes in lists:
        flat = [action for compute in computes for action in parts(compute)]
        for place, forward in enumerate(flat):
            if forward.op is F and forward.stage > 0 and forward.stage < stages:
                for later in flat[place + 1 :]:
                    if later.op in BACK and later.stage == forward.stage and later.microbatch < forward.microbatch:
                        found.append((forward._replace(stage=forward.stage - 1), later))
    found = [
        (forward, backward(lists, forward.stage, later.microbatch))
        for forward, later in found
        if find(lists, forward)[0] == find(lists, backward(lists, forward.stage, later.microbatch))[0]
    ]
    return random.choice(found) if found else None


def hold_back(lists: Lists, random: Random) -> bool:
    """A forward comes right after a backward that cannot run without it."""
    if not (pair := corner(lists, random)):
        return False
    drop(lists, pair[0])
    rank, place = find(lists, pair[1])
    lists[rank].insert(place + 1, pair[0])
    return True


def pull_ahead(lists: Lists, random: Random) -> bool:
    """A backward comes right before a forward that it cannot run without."""
    if not (pair := corner(lists, random)):
        return False
    drop(lists, pair[1])
    rank, place = find(lists, pair[0])
    lists[rank].insert(place, pair[1])
    return True


def join(lists: Lists, random: Random) -> bool:
    """A forward in one pair with a backward that cannot run without it."""
    if not (pair := corner(lists, random)):
        return False
    drop(lists, pair[1])
    rank, place = drop(lists, pair[0])
    lists[rank].insert(place, Overlap(*pair))
    return True


def pair_up(*ops: Op, same: bool = False) -> Corrupt:
    """Two actions of a rank become a pair that is none; ``same``: of one micro-batch."""

    def corrupt(lists: Lists, random: Random) -> bool:
        first = choose(lists, random, ops[0])
        if first is None:
            return False
        rank, _ = find(lists, first)
        rest = [a for c in lists[rank] for a in parts(c) if a.op is ops[1] and a != first]
        rest = [a for a in rest if (a.microbatch == first.microbatch) == same]
        if not rest:
            return False
        second = random.choice(rest)
        drop(lists, second)
        _, place = drop(lists, first)
        lists[rank].insert(place, Overlap(first, second))
        return True

    return corrupt


def lose(field: str) -> Corrupt:
    """All actions of a stage, or of a micro-batch that is not the last, are left out."""

    def corrupt(lists: Lists, random: Random) -> bool:
        action = choose(lists, random, F)
        assert action is not None
        value = getattr(action, field)
        for rank, computes in enumerate(lists):
            kept = [[a for a in parts(c) if getattr(a, field) != value] for c in computes]
            lists[rank] = [Overlap(*actions) if len(actions) == 2 else actions[0] for actions in kept if actions]
        return any(lists)

    return corrupt


def rest_one(lists: Lists, random: Random) -> bool:
    """A rank's work is given to the rank before it: none is left."""
    if len(lists) == 1:
        return False
    rank = random.randrange(1, len(lists))
    lists[rank - 1] = [*lists[rank - 1], *lists[rank]]
    lists[rank] = []
    return True


def scatter(lists: Lists, random: Random) -> bool:
    """One stage of one micro-batch goes, whole, to a rank of other stages."""
    action = choose(lists, random, F)
    assert action is not None
    rank, _ = find(lists, action)
    stages = {a.stage for c in lists[rank] for a in parts(c)}
    others = [r for r, cs in enumerate(lists) if not stages & {a.stage for c in cs for a in parts(c)}]
    if not others:
        return False
    into = lists[random.choice(others)]
    every = [a for c in lists[rank] for a in parts(c) if a[1:] == action[1:]]
    for each in every:
        drop(lists, each)
    into += every
    return True


def cut_off(lists: Lists, random: Random) -> bool:
    """The end of a rank's list is missing."""
    computes = random.choice(lists)
    del computes[random.randrange(len(computes)) :]
    return True


def repeat(lists: Lists, random: Random) -> bool:
    """A rank does its list twice."""
    computes = random.choice(lists)
    computes += list(computes)
    return True


def turn(lists: Lists, random: Random) -> bool:
    """A rank does its list from the end on."""
    random.choice(lists).reverse()
    return True
