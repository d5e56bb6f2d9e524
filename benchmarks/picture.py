"""A stretch of a profile as an SVG: what ranks compute, and what travels meanwhile.

    python benchmarks/picture.py runs/<id>/profile/trace.json out.svg [start end] [ranks]      times in milliseconds

    rank 0  compute  | attention F3 | experts B2 | ...          a colour a direction, a shade for odd micro-batches;
            network  |   combine B2 ------ | dispatch F3 ---    pale from launch to landing, full while it travels

Without times it draws the longest pair of a forward and a backward that rank 0 has run together.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

COLOURS = {
    "forward": ("#5c94d8", "#8fb8ea"),
    "backward": ("#5fae6b", "#93cb99"),
    "weights": ("#e3b341", "#ecc86f"),
    "other": ("#a8aeb6", "#a8aeb6"),
}
WIDTH, LABEL, ROW, TOP, LETTER = 1500, 120, 22, 50, 5.6  # pixels
COMPUTE, NETWORK = 2, 3  # threads of the trace, see training/timeline.py; further ones are of the network too

Event = dict[str, Any]


def find_pair(events: Sequence[Event]) -> tuple[float, float]:
    """Start and end, in milliseconds, of the longest pair of rank 0. ValueError where there is none."""
    pairs = [event for event in events if event.get("cat") == "action" and "&" in event["name"] and event["pid"] == 0]
    if not pairs:
        raise ValueError("the trace has no pair of a forward and a backward: give a start and an end")
    pair = max(pairs, key=lambda event: event["dur"])
    return pair["ts"] / 1000, (pair["ts"] + pair["dur"]) / 1000


def draw(events: Sequence[Event], start: float, end: float, ranks: Sequence[int]) -> str:
    """The picture of ``ranks`` from ``start`` to ``end``, in milliseconds."""
    scale = (WIDTH - LABEL - 10) / (end - start)
    shown = [
        event
        for event in events
        if event["ph"] == "X" and event["tid"] >= COMPUTE and event["pid"] in ranks
        and event["ts"] / 1000 < end and (event["ts"] + event["dur"]) / 1000 > start
    ]  # fmt: skip
    rows = sorted({(event["pid"], event["tid"]) for event in shown})
    height = TOP + sum(ROW + 8 * (tid == COMPUTE) for _, tid in rows) + 34
    body, y = list[str](), TOP
    for pid, tid in rows:
        y += 8 * (tid == COMPUTE)
        name = "compute" if tid == COMPUTE else "network"
        body.append(f'<text x="8" y="{y + 14}">{f"rank {pid}  {name}" if tid <= NETWORK else ""}</text>')
        body.append(f'<rect x="{LABEL}" y="{y - 1}" width="{WIDTH - LABEL - 10}" height="{ROW - 1}" fill="#eef0f2"/>')
        row = [event for event in shown if (event["pid"], event["tid"]) == (pid, tid)]
        body += _draw_row(row, start, end, scale, y)
        y += ROW
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="11">',
        f"<style>text{{fill:#1b1f24}}.m{{text-anchor:middle;font-size:9.5px}}{_style()}</style>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        *_legend(),
        *body,
        *_scale(start, end, scale, y + 16),
        "</svg>",
    ]
    return "\n".join([*lines, ""])


def _draw_row(row: Sequence[Event], start: float, end: float, scale: float, y: int) -> Iterator[str]:
    """The boxes of one thread; what lies inside another one is drawn after it."""
    held: Event = {"args": {}, "cat": "other"}
    for event in sorted(row, key=lambda event: (event["ts"], -event["dur"])):
        cat = event["cat"]
        if cat in COLOURS:
            held = event
        left = max(event["ts"] / 1000, start)
        width = max((min((event["ts"] + event["dur"]) / 1000, end) - left) * scale - 0.4, 0.3)
        x = LABEL + (left - start) * scale
        colour = f"{held['cat']}{held.get('args', {}).get('micro-batch', 0) % 2}"
        style = {"wait": "fill:none;stroke:#1b1f24;stroke-width:.7;stroke-dasharray:2 2"}.get(cat, "")
        if cat not in ("wait", "travels") and event["tid"] >= NETWORK:
            style = "fill-opacity:.35"
        top, tall = (y + ROW - 8, 5) if cat == "travels" else (y, ROW - 3)
        yield (
            f"<g><title>{escape(event['name'])}: {event['ts'] / 1000:.2f} to {(event['ts'] + event['dur']) / 1000:.2f} "
            f'ms</title><rect class="{colour}" style="{style}" x="{x:.1f}" y="{top}" width="{width:.1f}" '
            f'height="{tall}"/></g>'
        )
        if cat in COLOURS and (words := _fit(event, width)):
            line = y + (13 if event["tid"] == COMPUTE else 10)
            yield f'<text class="m" x="{x + width / 2:.1f}" y="{line}" pointer-events="none">{escape(words)}</text>'


def _fit(event: Event, width: float) -> str:
    """As much of an event's name as has room: layers.2.experts F0, experts F0, F0."""
    full = event["name"]
    short = full.rpartition(".")[2]
    return next((name for name in (full, short, full.rpartition(" ")[2]) if len(name) * LETTER <= width), "")


def _style() -> str:
    return "".join(f".{cat}{k}{{fill:{tone}}}" for cat, tones in COLOURS.items() for k, tone in enumerate(tones))


def _legend() -> Iterator[str]:
    left = 8.0
    for cat, meaning in {"forward": "F forward", "backward": "B backward", "weights": "W weight gradients"}.items():
        yield f'<rect class="{cat}0" x="{left:.0f}" y="14" width="12" height="12"/>'
        yield f'<text x="{left + 16:.0f}" y="24">{meaning}</text>'
        left += 36 + 6.2 * len(meaning)
    yield (
        f'<text x="{left:.0f}" y="24">lighter: odd micro-batches; dashed: waits. Network: pale from launch to landing, '
        "full while it travels</text>"
    )


def _scale(start: float, end: float, scale: float, y: int) -> Iterator[str]:
    step = next(each * 10.0**power for power in range(-2, 6) for each in (1, 2, 5)
                if each * 10.0**power >= (end - start) / 10)  # fmt: skip
    for number in range(int((end - start) / step) + 1):
        yield f'<text class="m" x="{LABEL + number * step * scale:.1f}" y="{y}">{number * step:g} ms</text>'


def main(words: Sequence[str]) -> None:
    """See the top of the file."""
    source, target, *rest = words
    events = json.loads(Path(source).read_text(encoding="utf-8"))["traceEvents"]
    start, end = (float(rest[0]), float(rest[1])) if len(rest) >= 2 else find_pair(events)
    ranks = [int(rank) for rank in rest[2].split(",")] if len(rest) > 2 else [0, 1]
    Path(target).write_text(draw(events, start, end, ranks), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
