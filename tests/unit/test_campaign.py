"""Which faults are drawn, and what is made of what a run says."""

from itertools import pairwise
from random import Random

import pytest

from launcher.campaign import Line, Mark, draw, judge, pair_up, share
from training.health.config import FailAt, Fault, Phase, parse


def seeded(seed: int) -> Random:
    return Random(seed)  # noqa: S311


@pytest.mark.parametrize("seed", range(5))
def test_twenty_five_faults_cover_every_kind_and_phase(seed: int) -> None:
    drawn = draw(25, 2, True, seeded(seed))
    assert {kind for _, _, kind in drawn} == set(Fault) and {phase for _, phase, _ in drawn} == set(Phase)
    assert 25 <= len(drawn) <= 32 and {rank for rank, _, _ in drawn} == {0, 1}


def test_many_faults_cover_every_pair() -> None:
    drawn = draw(120, 4, True, seeded(0))
    assert {(phase, kind) for _, phase, kind in drawn} >= set(pair_up(True))
    assert all(phase is not Phase.exchange for _, phase, _ in draw(120, 1, False, seeded(0)))


def test_what_is_drawn_can_happen_and_loading_comes_behind_a_death() -> None:
    runs = share(draw(100, 3, True, seeded(2)), 40, 8)
    for run in runs:
        assert [parse(str(fault)) for fault in run] == run and run[0].phase is not Phase.loading
        assert all(a.step < b.step < 40 for a, b in pairwise(run))
        for before, fault in pairwise(run):
            if fault.phase is Phase.loading:
                assert before.kind is Fault.kill
    assert sum(map(len, runs)) >= 100 and max(map(len, runs)) <= 9


def test_a_fault_is_noticed_by_what_is_said_of_its_rank_after_it() -> None:
    faults = [FailAt(1, 5, Phase.backward, Fault.kill), FailAt(0, 9, Phase.staging, Fault.kill)]
    lines = [
        Line(9.0, "shoestring: rank 1 was ended by SIGKILL, before anything happened"),
        Line(11.0, "shoestring: rank 1 was ended by SIGKILL in step 5"),
        Line(13.0, "goes on after step 3 and 1,024 tokens"),
        Line(21.0, "shoestring: rank 1 was ended by SIGKILL"),
        Line(22.0, "shoestring: starting again from the beginning (1 of 3)"),
    ]
    first, second = judge(faults, [Mark(10.0, 5), Mark(20.0, 9)], lines)
    assert first.noticed == lines[1].text and (first.again, first.seconds) == (1, 3.0)
    assert second.noticed == "", "of another rank"
    assert (second.again, second.seconds) == (9, 2.0), "the step was over when it was to be staged"


def test_a_fault_that_never_happened_is_said_to() -> None:
    (result,) = judge([FailAt(0, 5, Phase.forward, Fault.slow)], [None], [Line(1.0, "rank 0 is slow")])
    assert not result.happened and result.noticed == ""


def test_one_line_speaks_of_one_fault() -> None:
    faults = [FailAt(0, step, Phase.backward, Fault.nan) for step in (3, 6)]
    said = "step 3: loss or gradient were not finite, and are now: some machine was wrong, not the data"
    first, second = judge(faults, [Mark(1.0, 3), Mark(2.0, 6)], [Line(5.0, said)])
    assert first.noticed and not second.noticed
