"""Ways to corrupt programs: each takes the steps of a right one and changes them in place.

It says False where the program has nothing to corrupt so.
"""

from collections.abc import Callable
from random import Random

from parallel.pipeline.lower import Exchange, Kind, Step, Transfer, What

Lists = list[list[Step]]
Corrupt = Callable[[Lists, Random], bool]


def other_end(transfer: Transfer, rank: int) -> Transfer:
    return transfer._replace(kind=Kind.receive if transfer.kind is Kind.send else Kind.send, peer=rank)


def exchanges(lists: Lists, random: Random, least: int = 1) -> tuple[int, int]:
    """A rank and a step that is an exchange of at least so many transfers."""
    found = [
        (rank, place)
        for rank, steps in enumerate(lists)
        for place, step in enumerate(steps)
        if isinstance(step, Exchange) and len(step.transfers) >= least
    ]
    return random.choice(found) if found else (-1, -1)


def change(edit: Callable[[list[Transfer], Random, int], None], least: int = 1) -> Corrupt:
    """Edit the transfers of one exchange, on one end only."""

    def corrupt(lists: Lists, random: Random) -> bool:
        rank, place = exchanges(lists, random, least)
        if rank < 0:
            return False
        each = lists[rank][place]
        assert isinstance(each, Exchange)
        edited = list(each.transfers)
        edit(edited, random, len(lists))
        lists[rank][place] = Exchange(tuple(edited))
        return lists[rank][place] != each

    return corrupt


def drop_end(kind: Kind) -> Corrupt:
    def corrupt(lists: Lists, random: Random) -> bool:
        rank, place, chosen = random.choice(
            [
                (rank, place, each)
                for rank, steps in enumerate(lists)
                for place, step in enumerate(steps)
                if isinstance(step, Exchange)
                for each in step.transfers
                if each.kind is kind
            ]
        )
        lists[rank][place] = _without(lists[rank][place], chosen)
        return True

    return corrupt


def drop_both(lists: Lists, random: Random) -> bool:
    rank, place = exchanges(lists, random)
    step = lists[rank][place]
    assert isinstance(step, Exchange)
    gone = step.transfers[0]
    for where, end in ((rank, gone), (gone.peer, other_end(gone, rank))):
        lists[where] = [_without(each, end) for each in lists[where]]
    return True


def swap_steps(lists: Lists, random: Random) -> bool:
    """Two exchanges of a rank with one peer, the same way, change places."""
    rank, place = exchanges(lists, random)
    first = lists[rank][place]
    assert isinstance(first, Exchange)
    for other, step in enumerate(lists[rank]):
        if (
            isinstance(step, Exchange)
            and other > place
            and {e.peer for e in step.transfers} == {e.peer for e in first.transfers}
        ):
            lists[rank][place], lists[rank][other] = step, first
            return True
    return False


def late(lists: Lists, random: Random) -> bool:
    """A receive comes right behind the action that reads it: its exchange moves to the end."""
    rank, place = exchanges(lists, random)
    step = lists[rank][place]
    assert isinstance(step, Exchange)
    if all(each.kind is Kind.send for each in step.transfers):
        return False
    lists[rank].append(lists[rank].pop(place))
    return True


def early(lists: Lists, random: Random) -> bool:
    """A send comes before what it sends."""
    rank, place = exchanges(lists, random)
    step = lists[rank][place]
    assert isinstance(step, Exchange)
    if all(each.kind is Kind.receive for each in step.transfers):
        return False
    lists[rank].insert(0, lists[rank].pop(place))
    return True


def greedy(lists: Lists, random: Random) -> bool:
    """Rank 0 first waits for the last rank, so for what needs its own first send; each pair keeps its order."""
    last = len(lists) - 1
    for step in lists[0]:
        for each in step.transfers if isinstance(step, Exchange) else ():
            if each.peer == last > 1:
                lists[0] = [_without(other, each) for other in lists[0]]
                lists[0].insert(0, Exchange((each,)))
                return each.kind is Kind.receive
    return False


def _without(step: Step, gone: Transfer) -> Step:
    return Exchange(tuple(each for each in step.transfers if each != gone)) if isinstance(step, Exchange) else step


def swap_computes(lists: Lists, random: Random) -> bool:
    rank = random.randrange(len(lists))
    first, second = random.sample([p for p, step in enumerate(lists[rank]) if not isinstance(step, Exchange)], 2)
    lists[rank][first], lists[rank][second] = lists[rank][second], lists[rank][first]
    return True


def drop_compute(lists: Lists, random: Random) -> bool:
    rank = random.randrange(len(lists))
    del lists[rank][random.choice([p for p, step in enumerate(lists[rank]) if not isinstance(step, Exchange)])]
    return True


def double(edited: list[Transfer], random: Random, ranks: int) -> None:
    edited.append(random.choice(edited))


def swap(edited: list[Transfer], random: Random, ranks: int) -> None:
    """Two that travel between the same ranks change places, where there are two."""
    peers = [each.peer for each in edited]
    peer = max(peers, key=peers.count)
    if peers.count(peer) > 1:
        first, second = [place for place, each in enumerate(peers) if each == peer][:2]
        edited[first], edited[second] = edited[second], edited[first]


def redirect(edited: list[Transfer], random: Random, ranks: int) -> None:
    edited[0] = edited[0]._replace(peer=(edited[0].peer + random.randrange(1, ranks)) % ranks)


def turn(edited: list[Transfer], random: Random, ranks: int) -> None:
    edited[0] = other_end(edited[0], edited[0].peer)


def rename(edited: list[Transfer], random: Random, ranks: int) -> None:
    edited[0] = edited[0]._replace(stage=edited[0].stage + 1)


def relabel(edited: list[Transfer], random: Random, ranks: int) -> None:
    what = What.gradient if edited[0].what is What.activation else What.activation
    edited[0] = edited[0]._replace(what=what)
