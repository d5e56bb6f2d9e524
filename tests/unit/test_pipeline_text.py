"""Schedules as text: what is printed is read back, and what is no schedule is refused with line and word."""

from itertools import islice
from pathlib import Path

import pytest
from small_schedules import KINDS, sample

from parallel.pipeline.action import Action, Op, Overlap, Schedule
from parallel.pipeline.schedules import evaluate, generate
from parallel.pipeline.text import load, parse, render
from parallel.pipeline.validate import validate


@pytest.mark.parametrize(("name", "virtual"), KINDS)
def test_what_is_printed_is_read_back(name: str, virtual: int) -> None:
    for schedule in islice(sample(name, virtual), virtual, None, 3):
        assert parse(render(schedule), name) == schedule


def test_one_line_a_rank() -> None:
    assert render(generate("1f1b", 2, 3)) == (
        "# 1f1b: 2 ranks, 2 stages, 3 micro-batches\n0F0 0F1 0B0 0F2 0B1 0B2\n1F0 1B0 1F1 1B1 1F2 1B2\n"
    )


def test_a_rank_without_work_has_a_line() -> None:
    schedule = evaluate(generate("dualpipe", 4, 8).stage_map, 1)
    assert render(schedule).splitlines()[1:] == ["0F0 3F0", "1F0 2F0", "-", "-"]
    assert parse(render(schedule), "evaluate") == schedule


def test_a_schedule_of_ones_own_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# two in flight\n\n  0F0  0F1&0B0 0I1 0W1 # and the last one split\n")
    pair = Overlap(Action(Op.F, 0, 1), Action(Op.B, 0, 0))
    actions = (Action(Op.F, 0, 0), pair, Action(Op.I, 0, 1), Action(Op.W, 0, 1))
    assert load(path) == Schedule("mine", 1, 2, 1, (actions,))
    assert validate(load(path)) == (2,)
    path.write_text("0F0 0F1&0I0 0W0 0B1\n")
    assert validate(load(path)) == (2,)
    assert render(load(path)).splitlines()[1] == "0F0 0F1&0I0 0W0 0B1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0 0X0", 'line 1, word 2 "0X0": an action is stage, op'),
        ("# title\n0F0 0B0\n1F0 1b0", 'line 3, word 2 "1b0"'),
        ("0F0 F0", 'line 1, word 2 "F0"'),
        ("0F0 -1F0", 'line 1, word 2 "-1F0"'),
        ("0F0 0F", 'line 1, word 2 "0F"'),
        ("0F0 0F1 &0B0", 'line 1, word 3 "&0B0"'),
        ("0F0&", 'line 1, word 1 "0F0&"'),
        ("0F0 0B0&0F1", 'line 1, word 2 "0B0&0F1".*a pair is a forward & a backward'),
        ("0F0 0F1&0W0", 'line 1, word 2 "0F1&0W0"'),
        ("0F0 0F1&0B0&0B1", 'line 1, word 2 "0F1&0B0&0B1"'),
        ("0F0 0F1&0B0&", 'line 1, word 2 "0F1&0B0&"'),
        ("0F0 0F٣", 'line 1, word 2 "0F٣"'),
        ("0F99999999", 'line 1, word 1 "0F99999999"'),
        ("0F0 - 0B0", 'line 1, word 2 "-"'),
        ("0F0 __import__('os').abort()", 'line 1, word 2 "__import__'),
        ("0F0 " + "9" * 6000, f'line 1, word 2 "{"9" * 40}"'),
        ("", "mine: there is no action in it"),
        ("# nothing\n-\n", "mine: there is no action in it"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, "mine")
    path = tmp_path / "mine.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"mine.txt: .*{message}"):
        load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read as a schedule: .*No such file"):
        load(tmp_path / "none.txt")
    path = tmp_path / "binary.txt"
    path.write_bytes(b"\xff\xfe0F0")
    with pytest.raises(ValueError, match="cannot be read as a schedule"):
        load(path)
