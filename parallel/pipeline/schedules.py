"""Schedules: pure functions (rank, ranks, microbatches[, virtual]) -> what the rank computes, in order.

    loop            stage s lies on rank s % ranks                    gpipe, all of 1f1b, zb_h1
    v               stages r and 2 ranks - 1 - r lie on rank r        zb_v, [eager_]dualpipev
    bidirectional   ranks s and ranks - 1 - s hold a copy of stage s  dualpipe

F, B, I and W are the durations of the four ops, F&B that of an overlapped pair, P the ranks and M the micro-batches;
B = I + W. One rank is a pipeline too: 1f1b on it accumulates gradients over micro-batches, interleaved_1f1b_overlap
keeps two micro-batches in flight.

With few micro-batches a phase ends where there are no more of them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, repeat, zip_longest

from parallel.pipeline.action import Action, Compute, Op, Overlap, Schedule, StageMap
from parallel.placement import span

F, B, I, W = Op


def gpipe(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). Bubble (P-1)(F+B), M micro-batches alive.

        rank 0   F0 F1 F2 F3 .. .. B0 B1 B2 B3
        rank 1   .. F0 F1 F2 F3 B0 B1 B2 B3
    """  # fmt: skip
    return [Action(op, rank, i) for op in (F, B) for i in range(microbatches)]


def one_f_one_b(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """As soon as a micro-batch is back, one backward for one forward (PipeDream-flush; Megatron-LM, arXiv 2104.04473).

        rank 0   F0 F1 .. B0 F2 B1 F3 B2 .. B3        bubble (P-1)(F+B), P - rank micro-batches alive
        rank 1   .. F0 B0 F1 B1 F2 B2 F3 B3
    """  # fmt: skip
    forwards = [Action(F, rank, i) for i in range(microbatches)]
    backwards = [Action(B, rank, i) for i in range(microbatches)]
    return _alternate(forwards, backwards, ranks - 1 - rank)


def eager_1f1b(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """1F1B in which a message has a turn of its own to travel (Eager-1F1B: Alpa, arXiv 2211.05322).

        rank 0   F0 F1 F2 .. B0 F3 B1 .. B2 .. B3        bubble (P-1)(F+B), 2(P - rank) - 1 micro-batches alive
        rank 1   .. F0 B0 F1 B1 F2 B2 F3 B3
    """  # fmt: skip
    forwards = [Action(F, rank, i) for i in range(microbatches)]
    backwards = [Action(B, rank, i) for i in range(microbatches)]
    return _alternate(forwards, backwards, 2 * (ranks - 1 - rank))


def zb_h1(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """1F1B with the backward split: rank r lags r weight gradients behind (Zero Bubble's ZB-H1, arXiv 2401.10241).

        rank 0   F0 F1 .. I0 W0 F2 I1 W1 F3 I2 W2 .. I3 W3        bubble (P-1)(F+B-2W), P micro-batches alive
        rank 1   .. F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3

    Input gradients go ahead, and the last ranks, which are done first, have most weight gradients left to end with.
    """  # fmt: skip
    forwards = [Action(F, rank, i) for i in range(microbatches)]
    backwards = [Action(I, rank, i) for i in range(microbatches)]
    order: list[Compute] = []
    for action in _alternate(forwards, backwards, ranks - 1 - rank):
        order.append(action)
        if isinstance(action, Action) and action.op is I and action.microbatch >= rank:
            order.append(Action(W, rank, action.microbatch - rank))
    return order + [Action(W, rank, i) for i in range(max(0, microbatches - rank), microbatches)]


def interleaved_1f1b(rank: int, ranks: int, microbatches: int, virtual: int = 1) -> list[Compute]:
    """1F1B over a loop: ``virtual`` shorter stages a rank, so the bubble is as many times shorter (arXiv 2104.04473).

        2 ranks, 2 virtual stages      rank 0   0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
                                       rank 1   1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3

    Micro-batches go in rounds of P: a round passes through all stages of a rank before the next one does. Rounds are
    longer where P does not divide M: the bubble stays, a few more micro-batches are alive.
    """  # fmt: skip
    forwards, backwards, ahead = _rounds(rank, ranks, microbatches, virtual)
    return _alternate(forwards, backwards, ahead)


def interleaved_1f1b_overlap(rank: int, ranks: int, microbatches: int, virtual: int = 1) -> list[Compute]:
    """Interleaved 1F1B whose steady state is made of overlapped pairs: one forward more is under way on each rank.

        1 rank, 1 stage      rank 0   0F0 0F1&0B0 0F2&0B1 0B2
    """  # fmt: skip
    forwards, backwards, ahead = _rounds(rank, ranks, microbatches, virtual)
    pairs = zip_longest(forwards[ahead + 1 :], backwards)
    return [*forwards[: ahead + 1], *(compute for pair in pairs for compute in _join(*pair))]


def zb_v(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """Two stages a rank in a V, waits only at the ends (Zero Bubble's ZB-V, arXiv 2401.10241, 2405.15362).

        2 ranks     rank 0   0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
                    rank 1   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

    With F = I = W no rank waits between its first action and its last; 2P half-sized micro-batches are alive, as much
    memory as 1F1B's P. The ranks begin one after the other and end so: ``simulate`` gives both spans.
    """  # fmt: skip
    phases: Phases = [
        ([F0], 2 * (ranks - rank) - 1),
        ([F1, F0], rank),
        ([F1, I1, OLDEST], ranks - rank),
        ([F0, I0, OLDEST, F1, I1, OLDEST], microbatches - 2 * ranks + rank + 1),
        ([I0, OLDEST, F1, I1, OLDEST], ranks - rank - 1),
        ([I0, I1], rank),
        ([I0, OLDEST], ranks - rank),
        ([OLDEST], 2 * rank),
    ]
    return _numbered(phases, (rank, 2 * ranks - 1 - rank), (range(microbatches),) * 2)


def dualpipe(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """Micro-batches enter at both ends and pass each other in overlapped pairs (DeepSeek-V3, arXiv 2412.19437).

        stage s on ranks s and P-1-s       0 -> 1 -> 2 -> 3    the first half of the micro-batches
                                           3 <- 2 <- 1 <- 0    the second half

    Bubble (P/2-1)(F&B+B-3W), P + 1 micro-batches alive, two copies of the parameters.
    """  # fmt: skip
    near, each = min(rank, ranks - 1 - rank), microbatches // 2
    ways = range(each), range(each, microbatches)
    phases = _eight(near, ranks // 2, each)
    return _numbered(phases, (near, ranks - 1 - near), ways if rank == near else ways[::-1])


def dualpipev(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """DualPipe cut in half: where it has 2P ranks, rank r takes the other direction of rank 2P-1-r too.

        0 -> 1 -> 2 -> 3
        7 <- 6 <- 5 <- 4      4 ranks, two stages each: one copy, every micro-batch goes there and back

    Bubble (P-1)(F&B+B-3W), 2P + 1 half-sized micro-batches alive; F, B, W and F&B are those of one of the 2P stages.
    """  # fmt: skip
    phases = _eight(rank, ranks, microbatches)
    return _numbered(phases, (rank, 2 * ranks - 1 - rank), (range(microbatches),) * 2)


def eager_dualpipev(rank: int, ranks: int, microbatches: int) -> list[Compute]:
    """DualPipeV in which a message has a turn of its own to travel, as if between two ranks there were one more.

    In DualPipeV whatever a pair makes is what another rank has been waiting for, so a step is longer by a message for
    every micro-batch. Here that message is read a pair later. Bubble (P-1)F where F = I = W, at most 4P - 1 half-sized
    micro-batches alive. Ours; the idea is Eager-1F1B's.
    """
    phases = _eight(2 * rank, 2 * ranks - 1, microbatches)
    return _numbered(phases, (rank, 2 * ranks - 1 - rank), (range(microbatches),) * 2)


def evaluate(stage_map: StageMap, microbatches: int) -> Schedule:
    """Forwards only, wherever the stages lie: a rank goes by stage + micro-batch, as the wave comes in.

    Where stages have copies, the copies take micro-batches in turns.
    """
    ranks = 1 + max(max(holders) for holders in stage_map.holders_of)
    lists: list[list[Action]] = [[] for _ in range(ranks)]
    for stage, holders in enumerate(stage_map.holders_of):
        for i in range(microbatches):
            lists[holders[i % len(holders)]].append(Action(F, stage, i))
    for actions in lists:
        actions.sort(key=lambda action: (action.stage + action.microbatch, action))
    return Schedule("evaluate", ranks, microbatches, len(stage_map.holders_of), tuple(map(tuple, lists)))


Word = tuple[Op, int]  # an op of one of a rank's two stages
Words = list[Word | tuple[Word, Word]]  # or an overlapped pair
Phases = list[tuple[Words, int]]  # words, and how often they are repeated
F0, F1, B0, B1, I0, I1 = ((op, which) for op in (F, B, I) for which in (0, 1))
OLDEST = (W, 0)  # the weight gradient that has waited longest


def _eight(near: int, half: int, each: int) -> Phases:
    """DualPipe's eight phases on rank ``near`` of a half, ``each`` micro-batches a way; way 0 enters from this half."""
    ahead = half - 1 - near
    meet: Words = [(F0, B1), (F1, B0)] if ahead else [F0, B1, (F1, B0)]  # in the middle both ways arrive at once
    full: Words = [B1, B0] * (near + 1)
    split: Words = [I1, I0] * (near + 1)
    return [
        ([F0], 2 * ahead),
        ([F0, F1], near + 1),
        ([I1, OLDEST, F1], ahead),
        (meet, 1),
        ([(F0, B1), (F1, B0)], each - 2 * half + near),
        ([B1, (F1, B0)], ahead),
        (full[: near + 1] + split[near + 1 :], 1),
        ([OLDEST, I0], ahead),
        ([OLDEST], near + 1),
    ]


def _numbered(phases: Phases, stages: tuple[int, int], ways: tuple[range, ...]) -> list[Compute]:
    """The phases for a rank's two ``stages``: a word takes the next micro-batch of its way, while there is one."""
    ahead, back = [iter(way) for way in ways], [iter(way) for way in ways]
    streams = {
        (op, which): map(Action, repeat(op), repeat(stages[which]), (ahead if op is F else back)[which])
        for op, which in (F0, F1, B0, B1, I0, I1)
    }
    waiting: deque[Action] = deque()

    def number(word: Word) -> Action | None:
        if word is OLDEST:
            return waiting.popleft() if waiting else None
        action = next(streams[word], None)
        if action and action.op is I:
            waiting.append(Action(W, action.stage, action.microbatch))
        return action

    order: list[Compute] = []
    for words, count in phases:
        for _ in range(count):
            length = len(order)
            for word in words:
                order += _join(number(word)) if isinstance(word[0], Op) else _join(*map(number, word))
            if len(order) == length:  # no micro-batch is left for this phase
                break
    return order


def _join(forward: Action | None, backward: Action | None = None) -> tuple[Compute, ...]:
    """A pair, or what there is of it."""
    if forward and backward:
        return (Overlap(forward, backward),)
    action = forward or backward
    return (action,) if action else ()


def _alternate(forwards: Sequence[Action], backwards: Sequence[Action], ahead: int) -> list[Compute]:
    """``ahead`` forwards, then a forward and a backward in turns while there are any, then the other backwards."""
    turns = zip_longest(forwards[ahead:], backwards)
    return [action for action in chain(forwards[:ahead], *turns) if action]


def _rounds(rank: int, ranks: int, microbatches: int, virtual: int) -> tuple[list[Action], list[Action], int]:
    """Forwards and backwards of a rank in a loop, in rounds, and how many forwards are ahead of the first backward.

    A round has P micro-batches at least; where there are not as many, they are one round.
    """
    count = max(1, microbatches // ranks)
    rounds = [span(microbatches, count, place) for place in range(count)]
    stages = [chunk * ranks + rank for chunk in range(virtual)]
    forwards = [Action(F, stage, i) for each in rounds for stage in stages for i in each]
    backwards = [Action(B, stage, i) for each in rounds for stage in reversed(stages) for i in each]
    return forwards, backwards, 2 * (ranks - 1 - rank) + (virtual - 1) * max(ranks, *map(len, rounds))


class Route(StrEnum):
    """How a micro-batch visits the ranks."""

    loop = "loop"  # first rank to last, as often as a rank has stages
    v = "v"  # first to last and back
    bidirectional = "bidirectional"  # half of the micro-batches the other way, through copies of the stages


@dataclass(frozen=True)
class Generator:
    """A schedule's function and its rule: what ranks, micro-batches and virtual stages it can do with."""

    function: Callable[..., list[Compute]]
    placement: Route = Route.loop
    virtual: bool = False  # the function takes the stages of a rank
    even: bool = False  # ranks and micro-batches
    least: int = 0  # micro-batches for each rank
    splits: bool = False  # input gradients go ahead of weight gradients, at least now and then
    pairs: bool = False  # a forward and a backward go on at once

    def stages(self, ranks: int, virtual: int) -> int:
        """Stages of the whole pipeline."""
        return ranks * {Route.loop: virtual, Route.v: 2, Route.bidirectional: 1}[self.placement]

    def needs_native(self) -> str:
        """What of it no engine does that wraps modules of its own; empty if they do all of it."""
        if self.splits:
            return "it puts weight gradients off, and those never reach the hooks of other engines than native"
        return "it pairs a forward with a backward, which only native has been proved with" if self.pairs else ""


SCHEDULES = {
    "gpipe": Generator(gpipe),
    "1f1b": Generator(one_f_one_b),
    "eager_1f1b": Generator(eager_1f1b),
    "interleaved_1f1b": Generator(interleaved_1f1b, virtual=True),
    "interleaved_1f1b_overlap": Generator(interleaved_1f1b_overlap, virtual=True, pairs=True),
    "zb_h1": Generator(zb_h1, splits=True),
    "zb_v": Generator(zb_v, Route.v, splits=True),
    "dualpipe": Generator(dualpipe, Route.bidirectional, even=True, least=2, splits=True, pairs=True),
    "dualpipev": Generator(dualpipev, Route.v, least=2, splits=True, pairs=True),
    "eager_dualpipev": Generator(eager_dualpipev, Route.v, splits=True, pairs=True),
}


def generate(name: str, ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """The schedule ``name`` for all ranks; raises ValueError where its rule does not allow the numbers."""
    check(name, ranks, microbatches, virtual)
    generator = SCHEDULES[name]
    numbers = (ranks, microbatches, virtual) if generator.virtual else (ranks, microbatches)
    lists = tuple(tuple(generator.function(rank, *numbers)) for rank in range(ranks))
    return Schedule(name, ranks, microbatches, generator.stages(ranks, virtual), lists)


def check(name: str, ranks: int, microbatches: int, virtual: int = 1) -> None:
    """Refuse what ``name`` cannot be made for, with the value, the rule and what to do."""
    if name not in SCHEDULES:
        raise ValueError(f"parallel.pipeline.schedule={name} must be one of {', '.join(SCHEDULES)}")
    for key, value in (("parallel.pp", ranks), ("parallel.pipeline.virtual", virtual), ("micro-batches", microbatches)):
        if value < 1:
            raise ValueError(f"{key}={value} must be at least 1")
    generator = SCHEDULES[name]
    if virtual > 1 and not generator.virtual:
        raise ValueError(
            f"parallel.pipeline.virtual={virtual} must be 1 for parallel.pipeline.schedule={name}, which has "
            f"{generator.stages(1, 1)} stages a rank: take interleaved_1f1b to choose their number"
        )
    _check_even_and_least(name, ranks, microbatches)


def _check_even_and_least(name: str, ranks: int, microbatches: int) -> None:
    generator = SCHEDULES[name]
    if generator.even and ranks % 2:
        raise ValueError(
            f"parallel.pp={ranks} must be even for parallel.pipeline.schedule={name}, whose ranks come in pairs: take "
            f"dualpipev, or parallel.pp={ranks + 1}"
        )
    if generator.even and microbatches % 2:
        raise ValueError(
            f"micro-batches={microbatches} must be even for parallel.pipeline.schedule={name}, half of them for each "
            "direction: change run.micro_batch or run.global_batch"
        )
    if microbatches < generator.least * ranks:
        raise ValueError(
            f"micro-batches={microbatches} must be at least {generator.least} * parallel.pp = "
            f"{generator.least * ranks} for parallel.pipeline.schedule={name}: lower run.micro_batch or parallel.pp"
        )
