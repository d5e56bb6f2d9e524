"""``shoestring schedule`` as it is typed: what it prints and writes is read back; mistakes get an answer of a line."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_cli_mistakes import answer

from launcher import cli
from launcher.completion import complete
from parallel.pipeline import text
from parallel.pipeline.action import parts
from parallel.pipeline.schedules import SCHEDULES, generate
from parallel.pipeline.simulate import Cost, simulate

COSTS = ("cost.F=1", "cost.B=2", "cost.I=1", "cost.W=1", "cost.FB=3", "cost.send=0")
NUMBERS = ("rank", "actions", "busy", "bubble", "%", "in its span", "activations")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def lines(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    assert cli.main(["schedule", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def read_table(printed: list[str]) -> list[dict[str, float]]:
    """The rows about ranks, each with its numbers by column, and how many stages it has."""
    start = next(number for number, line in enumerate(printed) if line.split()[:1] == ["rank"]) + 1
    rows = []
    for line in printed[start:]:
        cells = line.replace("%", "").split()
        if not cells[0].isdecimal():
            return rows
        rows.append(dict(zip(NUMBERS, map(float, cells), strict=False)) | {"stages": len(cells) - len(NUMBERS)})
    return rows


def read_lists(printed: list[str]) -> str:
    """The lists, as the text form has them."""
    start = printed.index("what each rank does: stage, op, micro-batch") + 1
    return "\n".join(line.partition("  ")[2] for line in printed[start : printed.index("", start)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_prints_what_the_simulation_found(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    virtual = 3 if SCHEDULES[name].virtual else 1
    words = (f"name={name}", "ranks=8", "microbatches=20", "cost.F=2", "cost.I=2", "cost.B=3", "cost.send=1")
    printed = lines(capsys, *words, *([f"virtual={virtual}"] if virtual > 1 else []))
    schedule = generate(name, 8, 20, virtual)
    timeline = simulate(schedule, Cost(F=2, I=2, B=3, W=1, send=1))
    assert f"makespan {timeline.makespan}, bubble {max(timeline.bubbles)} (" in printed[0]
    rows = read_table(printed)
    assert [row["rank"] for row in rows] == list(range(8))
    assert [row["actions"] for row in rows] == [len(computes) for computes in schedule.lists]
    assert [row["busy"] for row in rows] == list(timeline.busy)
    assert [row["bubble"] for row in rows] == list(timeline.bubbles)
    assert [row["in its span"] for row in rows] == list(timeline.gaps)
    assert [row["activations"] for row in rows] == list(timeline.peaks)
    assert {row["stages"] for row in rows} == {schedule.stages / 8 * (1 + (name == "dualpipe"))}
    assert all(row["%"] == pytest.approx(100 * row["bubble"] / timeline.makespan, abs=0.06) for row in rows)
    assert text.parse(read_lists(printed), name).lists == schedule.lists


def test_costs_given_one_by_one_are_the_usual_ones(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("name=dualpipev", "ranks=8", "microbatches=20")
    printed = lines(capsys, *words, *COSTS)
    assert printed == lines(capsys, *words)
    assert printed[0].endswith("makespan 134, bubble 14 (10.4%), at most 17 activations alive")
    assert lines(capsys, *words, "cost.F=0.5")[1] == "costs F=0.5 B=2 I=1 W=1 FB=2.5 send=0"


def test_files_hold_what_was_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, trace, lists = (tmp_path / name for name in ("a.svg", "a.json", "a.txt"))
    printed = lines(capsys, "name=zb_v", f"svg={svg}", f"trace={trace}", f"text={lists}")
    assert [line.split(":")[0] for line in printed[-3:]] == ["svg", "trace", "text"]
    schedule = generate("zb_v", 4, 8)
    total = sum(map(len, schedule.lists))
    boxes = [element for element in ElementTree.parse(svg).getroot().iter() if element.tag.endswith("title")]  # noqa: S314
    assert len(boxes) == total
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(events) == total and events[0] | {"args": 0} == {
        "ph": "X", "name": "0F0", "cat": "F", "pid": 0, "tid": 0, "ts": 0, "dur": 1000, "args": 0
    }  # fmt: skip
    assert text.load(lists).lists == schedule.lists

    again = lines(capsys, f"file={lists}")
    assert again[0] == printed[0].replace("zb_v", "a", 1) and again[1:] == printed[1:-4]


def test_a_schedule_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("# two ranks\n0F0 0F1 0B0 0B1\n\n1F0 1B0 1F1 1I1 1W1  # the last one in two\n")
    printed = lines(capsys, f"file={mine}", "cost.send=1")
    assert printed[0].startswith("mine: 2 ranks, 2 stages, 2 micro-batches; makespan 10, bubble 4 (40.0%)")
    assert printed[-2:] == ["0 |F0 F1 ............B0    B1", "1 |......F0 B0    F1 I1 W1 ......"]


MISTAKES = {
    "name=dualpip": "did you mean dualpipe?",
    "name=": "must be one of gpipe, 1f1b,",
    "ranks=0": "must be at least 1",
    "ranks=1.5": "must be an integer",
    "ranks=many": "must be an integer",
    "microbatches=-4": "must be at least 1",
    "virtual=2": "must be 1 for name=1f1b",
    "virtual=2 name=zb_v": "must be 1 for name=zb_v, which has 2 stages a rank",
    "ranks=3 name=dualpipe microbatches=20": "must be even for name=dualpipe",
    "microbatches=9 name=dualpipe": "must be even for name=dualpipe",
    "microbatches=6 name=dualpipev": "must be at least 2 * ranks = 8 for name=dualpipev: raise it, or lower ranks",
    "ranks=100000 microbatches=100000": "must be at most 20,000,000",
    "cost.F=0": "must be positive",
    "cost.W=-1": "must be positive",
    "cost.B=nan": "must be a finite number",
    "cost.send=-1": "must not be negative",
    "cost.send=inf": "must be a finite number",
    "cost.FB=1": "must be at least cost.F=1 and cost.B=2",
    "cost.G=1": "there is no key cost.G",
    "rank=4": "did you mean ranks?",
    "zb_v": "must be written as key=value",
    "file=nowhere.txt": "No such file",
    "name=1f1b file=nowhere.txt": "must be left out: file=nowhere.txt says",
    "microbatches=3 file=nowhere.txt": "must be left out: file=nowhere.txt says",
    "svg=nowhere/a.svg": "cannot be written: No such file or directory",
    "trace=.": "cannot be written: Is a directory",
    "text=nowhere/a.txt": "cannot be written: No such file or directory",
    "--multirun ranks=2,4": "takes no sweeps",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = answer(capsys, "schedule", *line.split())
    assert line.split()[0].split("=")[0] in message and MISTAKES[line] in message
    assert not re.search(r"parallel\.|run\.(?!=)|micro-batches=", message.replace("for example run=", ""))
    assert not list(tmp_path.iterdir())


FILES = {
    "0F0 0B0\n1F0 1Q0": 'line 2, word 2 "1Q0": an action is',
    "# nothing": "there is no action in it",
    "0F0 0B0 0F0": 'rank 0, action 2 "0F0":',
    "0B0 0F0": 'rank 0, action 0 "0B0":',
    "0F0 1F0 0B0 1B0": 'rank 0, action 2 "0B0":',
    "0F0 0F9999999 0B0": "rank 0, action",
}


@pytest.mark.parametrize("content", FILES)
def test_a_bad_schedule_of_ones_own(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text(content)
    message = answer(capsys, "schedule", f"file={tmp_path}/mine.txt")
    assert f"{tmp_path}/mine.txt: " in message and FILES[content] in message


def test_a_file_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in answer(capsys, "schedule", f"file={tmp_path}/mine.txt")


def test_a_large_schedule_is_cut_with_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg, trace = tmp_path / "a.svg", tmp_path / "a.json"
    printed = lines(capsys, "name=1f1b", "ranks=300", "microbatches=300", f"svg={svg}", f"trace={trace}")
    assert len(printed) < 80 and max(map(len, printed)) < 250
    assert [row["rank"] for row in read_table([line for line in printed if line.strip() != ".."])] == [*range(8), 299]
    assert any(line.endswith(".. 580 more") for line in printed) and ".. 284 more ranks" in printed
    assert "24 of 300 ranks" in printed
    assert re.search(r"\(shown: 64 of 300 ranks, of the time the first and the last \S+\)$", printed[-2])
    assert re.search(r"\(shown: 166 of 300 ranks\)$", printed[-1])
    assert svg.stat().st_size < 4e6 and trace.stat().st_size < 2.5e7
    assert sum(event["ph"] == "X" for event in json.loads(trace.read_text())["traceEvents"]) == 166 * 600


def test_it_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from launcher import cli\n"
        "assert cli.main(['schedule', 'name=zb_v', 'svg=a.svg', 'trace=a.json', 'text=a.txt']) == 0\n"
        "print([name for name in ('torch', 'transformers', 'triton', 'deepspeed') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.endswith("\n[]\n") and run.stderr == ""
    assert {path.name for path in tmp_path.iterdir()} == {"a.svg", "a.json", "a.txt"}


@pytest.mark.parametrize("setting", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colours_are_for_terminals(setting: dict[str, str]) -> None:
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "60", **setting}
    if "NO_COLOR" not in setting:
        environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "launcher.schedule", "ranks=2", "microbatches=2"]
    with subprocess.Popen(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment, cwd=Path(__file__).parents[2]
    ) as run:
        os.close(writer)
        shown = b""
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # the terminal's other side is closed
                break
            if not piece:
                break
            shown += piece
    os.close(reader)
    assert run.returncode == 0 and b"makespan 9" in shown
    assert (b"\x1b[38;5;16;48;5;74mF0" in shown) == (not setting)


def test_words_are_completed() -> None:
    assert complete("shoestring schedule name=d") == ["name=dualpipe", "name=dualpipev"]
    assert complete("shoestring sched") == ["schedule"]
    assert {"ranks=", "cost.", "svg=", "file="} <= set(complete("shoestring schedule "))
    assert complete("shoestring schedule cost.F") == ["cost.F=", "cost.FB="]


def test_evaluation_is_a_schedule_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "forward.txt").write_text("0F0 0F1\n1F0 1F1\n")
    assert "makespan 3, bubble 1" in lines(capsys, f"file={tmp_path}/forward.txt")[0]
    assert all(part.op == "F" for part in parts(text.load(tmp_path / "forward.txt").lists[0][0]))
