"""Pictures read back: every action is where the timeline has it, in SVGs and terminals; large ones say what is cut."""

import re
from collections import Counter
from xml.etree import ElementTree

import pytest

from parallel.pipeline import draw
from parallel.pipeline.action import Schedule, parts
from parallel.pipeline.schedules import SCHEDULES, generate
from parallel.pipeline.simulate import Cost, Timeline, simulate

SVG = "{http://www.w3.org/2000/svg}"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def make(name: str, ranks: int = 4, microbatches: int = 8, **costs: int) -> Timeline:
    return simulate(generate(name, ranks, microbatches, 2 if SCHEDULES[name].virtual else 1), Cost(**costs))


def read_svg(timeline: Timeline) -> list[tuple[str, str, str, list[str], list[dict[str, str]]]]:
    """Of each box: its action, start, end, the numbers written on it, its rectangles."""
    root = ElementTree.fromstring(draw.write_svg(timeline))  # noqa: S314
    found = []
    for box in root.iter(f"{SVG}g"):
        action, start, end = re.fullmatch(r"(\S+): (\S+) to (\S+)", box.findtext(f"{SVG}title") or "").groups()
        numbers = [text.text or "" for text in box.iter(f"{SVG}text")]
        found.append((action, start, end, numbers, [rect.attrib for rect in box.iter(f"{SVG}rect")]))
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_svg_has_every_action_where_it_runs(name: str) -> None:
    timeline = make(name, send=1)
    boxes, spans = read_svg(timeline), list(timeline.rows(range(4)))
    assert len(boxes) == len(spans) > 60
    tones: dict[tuple[int, int], set[str]] = {}
    for (action, start, end, numbers, rectangles), span in zip(boxes, spans, strict=True):
        assert (action, float(start), float(end)) == (str(span.action), span.start, span.end)
        assert numbers == [str(part.microbatch) for part in parts(span.action)]
        for part, rectangle in zip(parts(span.action), rectangles, strict=True):
            assert rectangle["class"][0] == part.op
            tones.setdefault((span.rank, part.stage), set()).add(rectangle["class"][1])
    assert all(len(found) == 1 for found in tones.values()), "a stage has one shade on a rank"
    for rank in range(4):
        held = [found for (holder, _), found in tones.items() if holder == rank]
        assert len(set.union(*held)) == len(held), "and no other stage has it"


def test_boxes_lie_to_scale() -> None:
    timeline = make("zb_h1", F=2, B=5, I=3, W=2)
    spans = list(timeline.rows(range(4)))
    boxes = [rectangles[0] for *_, rectangles in read_svg(timeline)]
    scale = (float(boxes[1]["x"]) - float(boxes[0]["x"])) / (spans[1].start - spans[0].start)
    for box, span in zip(boxes, spans, strict=True):
        assert float(box["x"]) == pytest.approx(draw.LABEL + span.start * scale, abs=0.2)
        assert float(box["width"]) == pytest.approx((span.end - span.start) * scale, abs=1)
        assert float(box["y"]) == draw.TOP + span.rank * draw.ROW


def test_a_large_svg_says_what_it_leaves_out() -> None:
    timeline = simulate(generate("1f1b", 200, 400))
    text = draw.write_svg(timeline)
    assert len(text) < 4_000_000 and "shown: 64 of 200 ranks, of the time the first and the last " in text
    boxes = read_svg(timeline)
    assert 0.95 * draw.ACTIONS < len(boxes) <= draw.ACTIONS
    assert {"0F0", "0B399"} <= {box[0] for box in boxes}, "the first action of all, and the last"
    assert float(ElementTree.fromstring(text).attrib["width"]) <= draw.WIDTH + 300  # noqa: S314
    small = make("1f1b")
    assert draw.cut(small).words == "" and "shown:" not in draw.write_svg(small)


def test_shades_follow_the_way_of_a_micro_batch() -> None:
    assert [draw.list_stages(make("zb_v"), rank) for rank in (0, 3)] == [[0, 7], [3, 4]]
    assert [draw.list_stages(make("dualpipe"), rank) for rank in (0, 1, 2, 3)] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert draw.list_stages(make("interleaved_1f1b"), 1) == [1, 5]


def read_lines(lines: list[str], ranks: int) -> list[str]:
    """What a terminal shows of each rank, its bands joined."""
    rows = [""] * ranks
    for line in lines:
        label, edge, content = line.partition("|")
        if edge and label.strip():
            rows[int(label)] += content
    return rows


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_terminal_shows_every_action_by_name(name: str) -> None:
    timeline = make(name)
    rows = read_lines(draw.render(timeline, 10_000, colour=False), 4)
    for computes, row in zip(timeline.schedule.lists, rows, strict=True):
        several = len({part.stage for compute in computes for part in parts(compute)}) > 1
        names = [str(compute) if several else str(compute)[1:] for compute in computes]
        assert row.replace(".", " ").split() == names


def test_columns_are_to_scale() -> None:
    timeline = make("1f1b", F=2, B=4)
    rows = read_lines(draw.render(timeline, 10_000, colour=False), 4)
    for span in timeline.rows(range(4)):
        column = span.start * 3 / 2
        assert rows[span.rank][int(column) :].startswith(str(span.action)[1:] + " " * (span.action.op == "F"))
    assert [len(row) for row in rows] == [int(timeline.makespan * 3 / 2)] * 4 or rows[0].endswith("B7")


@pytest.mark.parametrize(("width", "bands"), [(20, 1), (40, 6), (80, 3), (133, 2), (300, 1)])
def test_bands_fit_and_lose_nothing(width: int, bands: int) -> None:
    timeline = make("dualpipev")
    lines = draw.render(timeline, width, colour=False)
    heads = [float(line.partition("|")[2]) for line in lines if line.startswith("  |")]
    assert len(heads) == bands and all(head.is_integer() for head in heads)
    assert max(len(line) for line in lines if "|" in line) <= width and len(lines) <= draw.LINES
    words = Counter(" ".join(read_lines(lines, 4)).replace(".", " ").split())
    short = [compute for span in timeline.rows(range(4)) if len(parts(compute := span.action)) == 1]
    if width > 40:  # actions of one unit are never cut by the end of a band
        assert all(words[str(action)] == 1 for action in short if action.op != "B") and len(short) > 70
    elif bands == 1:
        assert set("FfIiWwBb&") <= set("".join(words)) and not set(words) & set(map(str, short))


def test_bands_in_colour_lose_nothing() -> None:
    timeline = make("zb_v")
    lines = draw.render(timeline, 60, colour=True)
    assert max(len(ANSI.sub("", line)) for line in lines[:-1]) <= 60 and len(lines) > 2 * 5
    words = Counter(re.findall(r"\x1b\[[\d;]+m([FIW]\d) *\x1b\[0m", "".join(lines[:-1])))
    assert words == Counter({f"{op}{i}": 2 * 4 for op in "FIW" for i in range(8)})


def test_letters_only_where_there_is_no_room() -> None:
    lines = draw.render(simulate(generate("gpipe", 30, 100)), 100, colour=False)
    assert lines[0] == "24 of 30 ranks" and len(lines) == 26
    assert all(set(line.partition("|")[2]) <= set("FB.") for line in lines[2:])
    first = lines[2].partition("|")[2]
    assert first.startswith("F") and first.endswith("B") and "." in first
    assert 1.8 < first.count("B") / first.count("F") < 2.2


def test_colours_are_those_of_the_ops() -> None:
    lines = draw.render(make("zb_h1"), 120, colour=True)
    for op, (_, tones) in draw.COLOURS.items():
        painted = re.findall(rf"\x1b\[38;5;16;48;5;{tones[0]}m([FBIW])\d", "".join(lines[:-1]))
        assert set(painted) <= {op.value} and (painted or op.value == "B")
    assert all(meaning in lines[-1] for meaning in draw.MEANING.values())


def test_the_title_has_the_numbers() -> None:
    assert draw.title(make("1f1b")) == (
        "1f1b: 4 ranks, 4 stages, 8 micro-batches; makespan 33, bubble 9 (27.3%), at most 4 activations alive"
    )


def test_a_name_cannot_break_the_svg() -> None:
    lists = generate("gpipe", 1, 1).lists
    text = draw.write_svg(simulate(Schedule('<script>&"', 1, 1, 1, lists)))
    assert ElementTree.fromstring(text).findtext(f"{SVG}text", "").startswith('<script>&"')  # noqa: S314


@pytest.mark.parametrize(("count", "most"), [(1, 1), (5, 5), (5, 2), (100, 7), (1024, 64)])
def test_spread_keeps_both_ends(count: int, most: int) -> None:
    chosen = list(draw.spread(count, most))
    assert chosen == sorted(set(chosen)) and len(chosen) == min(count, most)
    assert chosen[0] == 0 and chosen[-1] == count - 1
