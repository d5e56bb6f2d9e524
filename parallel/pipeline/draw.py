"""Pictures of a simulated step: an SVG, and text for a terminal. Time goes right, ranks go down.

    0 |F0 F1 F2 .........B0    F3 B1    ...B2    ...B3       a colour an op, a shade for each of a rank's stages,
    1 |...F0 F1 ...B0    F2 B1    F3 B2    ...B3             the micro-batch's number; a pair shows both its actions

A large schedule is cut to what can be looked at, and the picture says so: ranks are taken at equal distances; of the
time the SVG shows the beginning and the end, the terminal one sample a column.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from math import ceil, floor

import numpy as np

from parallel.pipeline.action import Compute, Op, parts
from parallel.pipeline.simulate import Timeline

# An op's colours, first for the stage that a micro-batch comes to first on a rank: of the SVG, and of ANSI's 256.
COLOURS = {
    Op.F: (("#5c94d8", "#a9c8ee", "#7fb0e4", "#cfe0f5"), (74, 153, 111, 189)),
    Op.B: (("#5fae6b", "#aed8b1", "#86c48d", "#d2ead2"), (71, 157, 114, 194)),
    Op.I: (("#3fb0a6", "#9fd9d2", "#6fc5bc", "#c9ebe7"), (37, 116, 79, 195)),
    Op.W: (("#e3b341", "#f4dc9c", "#ecc86f", "#f9ebc6"), (178, 229, 222, 230)),
}
MEANING = {Op.F: "F forward", Op.B: "B backward", Op.I: "I input gradient", Op.W: "W weight gradient"}
RANKS, ACTIONS, WIDTH = 64, 10_000, 20_000  # of an SVG at most: rows, boxes, pixels (about 2 MB)
LINES = 48  # of a picture in a terminal
ROW, LABEL, TOP, BREAK = 26, 120, 64, 30  # pixels of the SVG: height of a rank, width of its name, title, cut in time
LETTER = 6.0  # pixels: width of a character in a box


@dataclass(frozen=True, slots=True)
class Cut:
    """What of a timeline a picture shows: some ranks and stretches of time, and words for what it leaves out."""

    ranks: Sequence[int]
    windows: tuple[tuple[float, float], ...]
    words: str


def cut(timeline: Timeline) -> Cut:
    """At most ``RANKS`` ranks and about ``ACTIONS`` actions."""
    world, end = timeline.schedule.ranks, float(timeline.makespan)
    ranks = spread(world, RANKS)
    count = sum(len(timeline.schedule.lists[rank]) for rank in ranks)
    words = [f"{len(ranks)} of {world} ranks"] if len(ranks) < world else []
    windows: tuple[tuple[float, float], ...] = ((0.0, end),)
    if count > ACTIONS:  # an action is shown if it starts before ``part`` or ends less than that before the end
        slots = np.concatenate([np.arange(*timeline.table.offsets[rank : rank + 2]) for rank in ranks])
        starts, ends = (times[slots].astype(float) for times in (timeline.starts, timeline.ends))
        part = float(np.partition(np.minimum(starts, end - ends), ACTIONS)[ACTIONS])
        windows = ((0.0, part), (end - part, end))
        words.append(f"of the time the first and the last {part:.4g}")
    return Cut(ranks, windows, ", ".join(words))


def spread(count: int, most: int) -> Sequence[int]:
    """At most ``most`` of ``range(count)`` at equal distances, the first and the last among them."""
    return range(count) if count <= most else [place * (count - 1) // (most - 1) for place in range(most)]


def list_stages(timeline: Timeline, rank: int) -> list[int]:
    """The stages of a rank in the order of their shades: as a micro-batch comes to them.

    Where two directions share ranks and stages, the shades are those of the directions.
    """
    table, ranks = timeline.table, timeline.schedule.ranks
    codes = table.codes[table.offsets[rank] : table.offsets[rank + 1]]
    found = np.unique(codes[codes >= 0] // table.microbatches % table.stages).tolist()
    return sorted(found, key=lambda stage: (stage // ranks, stage != rank, stage))


def write_svg(timeline: Timeline) -> str:
    """The picture as an SVG. Each box says on hovering what it is and when it runs."""
    shown = cut(timeline)
    length = sum(end - start for start, end in shown.windows)
    pixels = min((_room(timeline, full=False) + 1) * LETTER / _shortest(timeline), WIDTH / (length or 1))
    headline = title(timeline)
    width = max(LABEL + length * pixels + BREAK * (len(shown.windows) - 1) + 10, 16 + 7.5 * len(headline))
    height = TOP + ROW * len(shown.ranks) + 30
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} '
        f'{height}" font-family="sans-serif" font-size="11">',
        f"<style>text{{fill:#1b1f24}}.m{{text-anchor:middle;font-size:10px}}{_style()}</style>",
        f'<rect width="{width:.0f}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="20" font-size="14">{escape(headline)}</text>',
        *_legend(timeline, shown),
    ]
    left = float(LABEL)
    for window in shown.windows:
        lines += _draw_window(timeline, shown, window, left, pixels)
        left += (window[1] - window[0]) * pixels + BREAK
    for row, rank in enumerate(shown.ranks):
        stages = list_stages(timeline, rank)
        listed = ", ".join(map(str, stages[:4])) + (" .." if len(stages) > 4 else "")
        plural = "s" if len(stages) > 1 else ""
        lines.append(f'<text x="8" y="{TOP + row * ROW + 17}">{rank}: stage{plural} {listed}</text>')
    return "\n".join([*lines, "</svg>", ""])


def title(timeline: Timeline) -> str:
    """The schedule and its numbers in one line."""
    schedule, most = timeline.schedule, max(timeline.bubbles, default=0)
    share = float(most) / float(timeline.makespan or 1)
    return (
        f"{schedule.name}: {schedule.ranks} ranks, {schedule.stages} stages, {schedule.microbatches} micro-batches; "
        f"makespan {show(timeline.makespan)}, bubble {show(most)} ({share:.1%}), "
        f"at most {max(timeline.peaks, default=0)} activations alive"
    )


def show(number: object) -> str:
    """A time: an integer as it is, anything else in up to six digits."""
    return str(number) if isinstance(number, int) else f"{float(number):.6g}"  # type: ignore[arg-type]


def render(timeline: Timeline, width: int, colour: bool) -> list[str]:
    """Lines of at most ``width`` characters; with ``colour``, in ANSI's 256 colours.

    If every action has room for its name in a few bands of time below each other, these are made. Else the whole step
    is one band, and a column shows what runs at its middle. Dots are idle.
    """
    schedule, end = timeline.schedule, float(timeline.makespan)
    ranks, digits = spread(schedule.ranks, LINES // 2), len(str(schedule.ranks - 1))
    columns, shortest = max(10, width - digits - 2), _shortest(timeline)
    for full in (not colour, False):
        column = _room(timeline, full) + (not colour)  # characters for the shortest action
        bands = ceil(round(end / shortest * column / (columns // column * column), 9)) or 1
        if bands * (len(ranks) + 2) <= LINES:
            columns, scale = columns // column * column, column / shortest
            break
    else:
        bands, scale = 1, columns / end
        scale = floor(scale * shortest) / shortest if scale * shortest >= 1 else scale
    lines = [f"{len(ranks)} of {schedule.ranks} ranks"] if len(ranks) < schedule.ranks else []
    for band in range(bands):
        middles = (band * columns + np.arange(columns) + 0.5) / scale
        middles = middles[middles < end]
        lines.append(f"{'':{digits}} |{show(round(band * columns / scale, 6))}".removesuffix(".0"))
        lines += [f"{rank:>{digits}} |{_draw_row(timeline, rank, middles, (colour, full))}" for rank in ranks]
    return [*lines, *_explain(timeline, colour, full)]


def _explain(timeline: Timeline, colour: bool, full: bool) -> list[str]:
    """What the colours of a picture in a terminal are, or its small letters."""
    several = len(list_stages(timeline, 0)) > 1
    if colour:
        ops = " ".join(f"\x1b[38;5;16;48;5;{COLOURS[op][1][0]}m {meaning} \x1b[0m" for op, meaning in MEANING.items())
        return [ops + (" lighter: a later stage of the rank" if several else "")]
    return ["small letters: a later stage of the rank"] if several and not full else []


def _shortest(timeline: Timeline) -> float:
    """The duration of the shortest action there is."""
    return float((timeline.ends - timeline.starts).min()) if len(timeline.ends) else 1.0


def _room(timeline: Timeline, full: bool) -> int:
    """Characters for the name of any action, with ``full`` of its stage too if a rank has several."""
    schedule = timeline.schedule
    several = full and len(list_stages(timeline, 0)) > 1
    return 1 + len(str(schedule.microbatches - 1)) + several * len(str(schedule.stages - 1))


def _names(compute: Compute, stages: list[int], small: bool) -> list[str]:
    """What to write on an action, the longest first; if ``small``, a later stage has small letters."""
    later = [small and part.stage != stages[0] for part in parts(compute)]
    letters = [part.op.lower() if last else str(part.op) for part, last in zip(parts(compute), later, strict=True)]
    numbered = [f"{letter}{part.microbatch}" for letter, part in zip(letters, parts(compute), strict=True)]
    return [str(compute), "&".join(numbered), letters[0] if len(letters) == 1 else "&"]


def _draw_row(timeline: Timeline, rank: int, middles: np.ndarray, style: tuple[bool, bool]) -> str:
    """A rank in a band: what runs at each of the times ``middles``, a character each; in colour, with full names."""
    colour, full = style
    first, last = timeline.table.offsets[rank : rank + 2].tolist()
    starts, ends = (times[first:last].astype(float) for times in (timeline.starts, timeline.ends))
    found = np.searchsorted(starts, middles, side="right") - 1
    running = np.where((found >= 0) & (middles < np.append(ends, 0)[found]), found, -1).tolist()
    stages, pieces = list_stages(timeline, rank), []
    for slot, columns in groupby(running):
        width = len(list(columns))
        if slot < 0:
            pieces.append((" " if colour else ".") * width)
            continue
        compute = timeline.schedule.lists[rank][slot]
        names = _names(compute, stages, small=not colour)[not full or len(stages) == 1 :]
        name = next((name for name in names if len(name) + (not colour) <= width), names[-1]).ljust(width)
        pieces.append(_paint(compute, name, stages) if colour else name)
    return "".join(pieces).rstrip()


def _paint(compute: Compute, text: str, stages: list[int]) -> str:
    """``text`` on the colour of its op; of a pair, half on each."""
    actions = parts(compute)
    half = len(text) // len(actions)
    painted = []
    for place, action in enumerate(actions):
        tones = COLOURS[action.op][1]
        piece = text[place * half :] if action is actions[-1] else text[:half]
        painted.append(f"\x1b[38;5;16;48;5;{tones[stages.index(action.stage) % len(tones)]}m{piece}")
    return "".join(painted) + "\x1b[0m"


def _style() -> str:
    """One class an op and shade: ``F0``, ``F1``, .."""
    return "".join(f".{op}{k}{{fill:{tone}}}" for op, (tones, _) in COLOURS.items() for k, tone in enumerate(tones))


def _legend(timeline: Timeline, shown: Cut) -> Iterator[str]:
    """The ops that occur, in their colours, and what the picture leaves out."""
    codes = timeline.table.codes
    used = set(np.unique(codes[codes >= 0] // (timeline.table.stages * timeline.table.microbatches)).tolist())
    left = 8.0
    for number, (op, meaning) in enumerate(MEANING.items()):
        if number in used:
            yield f'<rect class="{op}0" x="{left:.0f}" y="30" width="12" height="12"/>'
            yield f'<text x="{left + 16:.0f}" y="40">{meaning}</text>'
            left += 30 + 6.5 * len(meaning)
    if shown.words:
        yield f'<text x="{left:.0f}" y="40" font-weight="bold">shown: {escape(shown.words)}</text>'


def _draw_window(
    timeline: Timeline, shown: Cut, window: tuple[float, float], left: float, pixels: float
) -> Iterator[str]:
    """The boxes of a stretch of time, and a scale below them."""
    start, end = window
    bottom = TOP + ROW * len(shown.ranks)
    yield (
        f'<rect x="{left:.1f}" y="{TOP - 1}" width="{(end - start) * pixels:.1f}" height="{bottom - TOP}" '
        'fill="#eef0f2"/>'
    )
    for row, rank in enumerate(shown.ranks):
        first, last = timeline.table.offsets[rank : rank + 2].tolist()
        starts, ends = (times[first:last].astype(float) for times in (timeline.starts, timeline.ends))
        stages = list_stages(timeline, rank)
        for slot in np.flatnonzero((ends > start) & (starts < end)).tolist():
            box = (max(starts[slot], start) - start) * pixels + left, (min(ends[slot], end) - start) * pixels + left
            compute = timeline.schedule.lists[rank][slot]
            yield _draw_box(compute, stages, box, TOP + row * ROW, f"{show(starts[slot])} to {show(ends[slot])}")
    step = _tick((end - start) / 8)
    for number in range(ceil(start / step), floor(end / step) + 1):
        x = left + (number * step - start) * pixels
        yield f'<text class="m" x="{x:.1f}" y="{bottom + 16}">{show(float(number * step))}</text>'


def _draw_box(compute: Compute, stages: list[int], box: tuple[float, float], top: int, when: str) -> str:
    """An action, or a pair with its forward above its backward."""
    actions = parts(compute)
    height = (ROW - 2) / len(actions)
    pieces = [f"<g><title>{escape(str(compute))}: {when}</title>"]
    for place, action in enumerate(actions):
        y, width, tones = top + place * height, box[1] - box[0], COLOURS[action.op][0]
        tone = stages.index(action.stage) % len(tones)
        pieces.append(
            f'<rect class="{action.op}{tone}" x="{box[0]:.1f}" y="{y:.1f}" width="{max(width - 0.6, 0.3):.1f}" '
            f'height="{height - 0.4:.1f}"/>'
        )
        if len(str(action.microbatch)) * LETTER <= width:
            x, middle = (box[0] + box[1]) / 2, y + height / 2 + 3.6
            pieces.append(f'<text class="m" x="{x:.1f}" y="{middle:.1f}">{action.microbatch}</text>')
    return "".join([*pieces, "</g>"])


def _tick(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, .. (or of their tenths, ..) that is at least ``least``."""
    power = 10.0 ** floor(np.log10(least)) if least > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10, 20) if power * factor >= least)
