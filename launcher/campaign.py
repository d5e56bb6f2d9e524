"""Which faults a run is put through, and what has to come of each: rules only, no process.

draw     kinds and phases in an order that meets every one of them early, each at a rank and a step drawn by a seed
judge    what a run said between one fault and the next --> whether it was noticed, and what it cost
"""

import re
from collections.abc import Iterable, Sequence
from random import Random
from typing import NamedTuple

from training.health.config import WHERE, FailAt, Fault, Phase

# What a run says of each; {rank}: whose it was.
SIGNS = {
    Fault.kill: r"rank {rank} was ended by SIGKILL",
    Fault.term: r"rank {rank} was ended by SIGTERM",
    Fault.segv: r"rank {rank} was ended by SIGSEGV",
    Fault.exit: r"rank {rank} ended with exit code 7",
    Fault.stop: r"rank {rank} is stuck",
    Fault.stuck: r"rank {rank} is stuck",
    Fault.error: r"rank {rank} raised InjectedError",
    Fault.nan: r"some machine was wrong, not the data",
    Fault.flip: r"CorruptionError: .*rank {rank}: (weight|master)/",  # one memory, where precision=fp32
    Fault.slow: r"rank {rank} is slow",
    Fault.full: r"no checkpoint after step .*rank {rank}: .*No space left on device",
    Fault.write: r"no checkpoint after step .*rank {rank}: .*Input/output error",
    Fault.corrupt: r"the checkpoint after step \d+ cannot be loaded .* is damaged",
    Fault.peer: r"rank \d+ (lost its connection|was ended by SIGABRT|raised .*(gloo|onnection|DistError))",
}
AGAIN = re.compile(r"goes on after step (\d+)")
BEFORE = (Phase.forward, Phase.exchange, Phase.backward, Phase.optimizer)  # a step is over
FIRST = 2  # a step with a fault
BEGINNING = "starting again from the beginning"


class Line(NamedTuple):
    """Something that a run said."""

    time: float  # seconds of the machine's clock
    text: str


class Mark(NamedTuple):
    """That a fault has happened."""

    time: float  # seconds of the machine's clock
    step: int  # that the rank was in, or that had just been taken


class Result(NamedTuple):
    """What came of a fault."""

    fault: FailAt
    happened: bool
    noticed: str  # the line; empty if there was none
    again: int | None  # steps that were computed again; None: the run did not stop
    seconds: float | None  # from the fault until the run went on


def pair_up(exchanges: bool) -> list[tuple[Phase, Fault]]:
    """Every phase with every fault that happens there; ``exchanges``: whether tokens travel."""
    phases = [phase for phase in Phase if exchanges or phase is not Phase.exchange]
    return [(phase, kind) for kind in Fault for phase in phases if phase in WHERE.get(kind, tuple(Phase))]


def order(pairs: Sequence[tuple[Phase, Fault]], random: Random) -> list[tuple[Phase, Fault]]:
    """All ``pairs``, each next one such that kinds and phases come round about equally often."""
    left, done = list(pairs), list[tuple[Phase, Fault]]()
    random.shuffle(left)
    while left:
        pick = min(left, key=lambda pair: (sum(k is pair[1] for _, k in done), sum(p is pair[0] for p, _ in done)))
        left.remove(pick)
        done.append(pick)
    return done


def draw(count: int, ranks: int, exchanges: bool, random: Random) -> list[tuple[int, Phase, Fault]]:
    """``count`` faults or a few more: what is to happen while a rank loads comes behind what makes it load."""
    pairs = pair_up(exchanges)
    found: list[tuple[int, Phase, Fault]] = []
    while len(found) < count:
        for phase, kind in order(pairs, random)[: count - len(found)]:
            if phase is Phase.loading:
                found.append((random.randrange(ranks), Phase.optimizer, Fault.kill))
            found.append((0 if phase is Phase.committing else random.randrange(ranks), phase, kind))
    return found


def share(faults: Sequence[tuple[int, Phase, Fault]], steps: int, a_run: int) -> list[list[FailAt]]:
    """Runs of ``steps`` with about ``a_run`` faults each, one after the other, spread over the steps."""
    runs: list[list[tuple[int, Phase, Fault]]] = []
    for fault in faults:
        if not runs or (len(runs[-1]) >= a_run and fault[1] is not Phase.loading):
            runs.append([])
        runs[-1].append(fault)
    every = max(1, (steps - FIRST) // (a_run + 4))  # some come later: training/health/faults.py
    return [[FailAt(rank, FIRST + n * every, phase, kind) for n, (rank, phase, kind) in enumerate(run)] for run in runs]


def judge(faults: Sequence[FailAt], marks: Sequence[Mark | None], lines: Iterable[Line]) -> list[Result]:
    """What came of each of a run's ``faults``, of which ``marks`` say when they happened, from what the run said."""
    left, results = list(lines), []
    for number, (fault, mark) in enumerate(zip(faults, marks, strict=True)):
        if mark is None:
            results.append(Result(fault, False, "", None, None))
            continue
        end = next((later.time for later in marks[number + 1 :] if later is not None), float("inf"))
        sign = re.compile(SIGNS[fault.kind].format(rank=fault.rank))
        noticed = next((line for line in left if line.time >= mark.time and sign.search(line.text)), None)
        if noticed is not None:
            left.remove(noticed)  # says it of one fault, not of two
        here = [line for line in left if mark.time <= line.time < end]
        results.append(Result(fault, True, noticed.text if noticed else "", *_find_restart(fault, mark, here)))
    return results


def _find_restart(fault: FailAt, mark: Mark, lines: Sequence[Line]) -> tuple[int | None, float | None]:
    for line in lines:
        found = AGAIN.search(line.text)
        if found or BEGINNING in line.text:
            taken = mark.step - (fault.phase in BEFORE)
            return max(0, taken - (int(found[1]) if found else 0)), line.time - mark.time
    return None, None
