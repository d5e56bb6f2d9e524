"""Line charts as HTML with an SVG inside: whatever its width, lines stay thin and words stay of one size.

    figure     caption: what it is, its unit, a legend
      .plot    y marks (HTML, at a share of the height) | svg, stretched to the room there is | x marks (HTML)

Strokes do not stretch (vector-effect), and a point is a line without length and with a round end. On hovering, or to
who reads the source, every one of HOVER stretches of time says its mean and extremes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from launcher.page.scale import Scale, list_steps, span_values, write_number, write_ticks
from launcher.page.thin import COLUMNS, Span, choose_window, smooth, spot, thin

WIDTH, HEIGHT = 1000, 400  # units of the svg, not pixels
HOVER = 80  # stretches of time that say what they show


@dataclass(frozen=True, slots=True)
class Frame:
    """The steps that charts have in common."""

    steps: np.ndarray  # [N], from 1; those before the span count for means
    span: Span  # from the first to the last step shown
    resumed: Sequence[int]  # steps that came first after a restart
    skipped: np.ndarray  # steps that moved nothing

    @property
    def first(self) -> int:
        """How many steps come before the span."""
        return int(np.searchsorted(self.steps, self.span[0]))

    @property
    def window(self) -> int:
        """Over how many steps means are taken."""
        return choose_window(len(self.steps))

    def x(self, step: np.ndarray | float) -> np.ndarray:
        """Where a step is, 0 to WIDTH."""
        first, last = self.span
        return (np.asarray(step, dtype=np.float64) - first) / max(1.0, last - first) * WIDTH

    def cut(self, first: float) -> "Frame":
        """From the step ``first`` on."""
        return replace(self, span=(first, self.span[1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A series of a chart, over the frame's steps."""

    name: str
    values: np.ndarray  # [N]
    colour: str = "a"  # a class of launcher/page/style.py
    mean: bool = False  # drawn faint, its mean over the last steps above it


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What is drawn, and how."""

    title: str
    unit: str
    lines: Sequence[Line]
    points: Sequence[tuple[int, float]] = ()  # (step, value) of an evaluation
    points_name: str = ""
    zero: bool = False  # the axis begins at 0
    log: bool = False  # it may be a logarithm's
    whole: bool = False  # values are counts


def draw(chart: Chart, frame: Frame) -> str:
    """The figure."""
    points = [(step, value) for step, value in chart.points if frame.span[0] <= step <= frame.span[1]]
    shown = [line.values[frame.first :] for line in chart.lines]
    scale = span_values(np.concatenate([*shown, [value for _, value in points]]), chart.zero, chart.log, chart.whole)
    body = [_draw_grid(scale), *_draw_marks(frame), *_draw_lines(chart, frame, scale)]
    if points:
        body += _draw_points(points, frame, scale, chart.points_name)
    body += _draw_hover(chart, frame)
    unit = [chart.unit] * bool(chart.unit) + ["logarithmic"] * scale.log
    if len(chart.lines) > 1 and any(line.mean for line in chart.lines) and frame.window > 1:
        unit.append(f"means of {frame.window:,} steps")
    legend = list(_list_legend(chart, frame, bool(points)))
    inside = plot(_svg(chart, frame.first, body), _mark_y(scale), _mark_x(frame))
    return figure(chart.title, ", ".join(unit), legend, inside)


def figure(title: str, unit: str, legend: Sequence[tuple[str, str]], inside: str, note: str = "") -> str:
    """A figure around ``inside``; the legend is of (class, words)."""
    keys = "".join(f'<span class="key {escape(kind)}">{escape(words)}</span>' for kind, words in legend)
    return (
        f'<figure><figcaption><b>{escape(title)}</b> <span class="unit">{escape(unit)}</span>'
        f'<span class="legend">{keys}</span></figcaption>{inside}'
        + (f'<p class="note">{escape(note)}</p>' if note else "")
        + "</figure>"
    )


def plot(svg: str, ys: Sequence[tuple[float, str]], xs: Sequence[tuple[float, str]], style: str = "") -> str:
    """``svg`` with its marks: (share of the height or width, words)."""
    left = "".join(f'<span style="top:{100 * place:.2f}%">{escape(words)}</span>' for place, words in ys)
    below = "".join(f'<span style="left:{100 * place:.2f}%">{escape(words)}</span>' for place, words in xs)
    room = max((len(words) for _, words in ys), default=0)
    given = f"--room:{max(37, 7.2 * room + 9):.0f}px;{style}"
    return (
        f'<div class="plot" style="{given}"><div class="ys" aria-hidden="true">{left}</div>{svg}'
        f'<div class="xs" aria-hidden="true">{below}</div></div>'
    )


def write_path(points: np.ndarray) -> str:
    """[n, 2] in units of the svg -> the ``d`` of a path; a single point is a line without length."""
    words = [f"{x:.1f} {y:.1f}".replace(".0 ", " ").removesuffix(".0") for x, y in points.tolist()]
    return f"M{words[0]}h0" if len(words) == 1 else "M" + "L".join(words)


def _svg(chart: Chart, first: int, body: Sequence[str]) -> str:
    said = [f"{line.name}: {_sum_up(line.values[first:])}" for line in chart.lines]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img">'
        f"<title>{escape(chart.title)}, {escape(chart.unit)}</title><desc>{escape('; '.join(said))}</desc>"
        f"{''.join(body)}</svg>"
    )


def _sum_up(values: np.ndarray) -> str:
    """A series in words."""
    found = values[np.isfinite(values)]
    if not len(found):
        return "no value"
    first, last, low, high = (write_number(float(each)) for each in (found[0], found[-1], found.min(), found.max()))
    return f"from {first} to {last}, at least {low}, at most {high}"


def _place(points: np.ndarray, frame: Frame, scale: Scale) -> np.ndarray:
    return np.stack([frame.x(points[:, 0]), HEIGHT * (1 - scale.place(points[:, 1]))], axis=1)


def _draw_grid(scale: Scale) -> str:
    ys = [HEIGHT * (1 - float(scale.place(tick))) for tick in scale.ticks()]
    return f'<path class="rule" d="{"".join(f"M0 {y:.1f}H{WIDTH}" for y in ys)}"/>'


def _draw_marks(frame: Frame) -> Iterator[str]:
    """Restarts from top to bottom, skipped steps as short strokes on the floor."""
    first, last = frame.span
    for step in sorted({step for step in frame.resumed if first < step <= last}):
        x = float(frame.x(step - 0.5))
        yield f'<path class="restart" d="M{x:.1f} 0V{HEIGHT}"><title>went on with step {step:,}</title></path>'
    skipped = frame.skipped[(frame.skipped >= first) & (frame.skipped <= last)]
    if len(skipped):
        kept = skipped[np.unique(spot(skipped, frame.span), return_index=True)[1]]
        words = f"{len(skipped):,} steps were skipped" if len(skipped) > 1 else f"step {int(skipped[0]):,} was skipped"
        d = "".join(f"M{x:.1f} {HEIGHT}v-14" for x in frame.x(kept).tolist())
        yield f'<path class="skipped" d="{d}"><title>{words}</title></path>'


def _draw_lines(chart: Chart, frame: Frame, scale: Scale) -> Iterator[str]:
    for line in chart.lines:
        faint = line.mean and frame.window > 1
        yield _draw_line(line.values, frame, scale, f"line {line.colour}{' raw' * faint}")
        if faint:
            yield _draw_line(smooth(line.values, frame.window), frame, scale, f"line {line.colour}")


def _draw_line(values: np.ndarray, frame: Frame, scale: Scale, kind: str) -> str:
    pieces = thin(frame.steps[frame.first :], values[frame.first :], frame.span)
    d = "".join(write_path(_place(piece, frame, scale)) for piece in pieces)
    return f'<path class="{kind}" d="{d}"/>' if d else ""


def _draw_points(points: Sequence[tuple[int, float]], frame: Frame, scale: Scale, name: str) -> Iterator[str]:
    table = np.array(points, dtype=np.float64)
    if len(table) > COLUMNS:
        pieces = thin(table[:, 0], table[:, 1], frame.span)
        table = np.concatenate(pieces)
    for (x, y), (step, value) in zip(_place(table, frame, scale).tolist(), table.tolist(), strict=True):
        words = f"{name} {write_number(value)} after step {int(step):,}"
        yield f'<path class="point" d="M{x:.1f} {y:.1f}h0"><title>{escape(words)}</title></path>'


def _draw_hover(chart: Chart, frame: Frame) -> Iterator[str]:
    """Transparent stretches that say what is there."""
    steps = frame.steps[frame.first :]
    count = min(HOVER, len(steps))
    if not count:
        return
    columns = spot(steps, frame.span, count)
    width = WIDTH / count
    for part in np.split(np.arange(len(columns)), np.flatnonzero(np.diff(columns)) + 1):
        first, last = int(steps[part[0]]), int(steps[part[-1]])
        said = [f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"]
        said += [f"{line.name} {_say(line.values[frame.first + part])}" for line in chart.lines]
        x = columns[part[0]] * width
        title = escape("\n".join(said))
        yield f'<rect class="hover" x="{x:.1f}" width="{width:.1f}" height="{HEIGHT}"><title>{title}</title></rect>'


def _say(values: np.ndarray) -> str:
    found = values[np.isfinite(values)]
    if not len(found):
        return "not finite"
    if len(found) == 1 or found.min() == found.max():
        return write_number(float(found[0]))
    mean, low, high = (write_number(float(each)) for each in (found.mean(), found.min(), found.max()))
    return f"{mean} ({low} to {high})"


def _list_legend(chart: Chart, frame: Frame, points: bool) -> Iterator[tuple[str, str]]:
    for line in chart.lines:
        if len(chart.lines) > 1:
            yield f"stroke {line.colour}", line.name
        elif line.mean and frame.window > 1:
            yield f"stroke {line.colour} raw", line.name
            yield f"stroke {line.colour}", f"mean of {frame.window:,} steps"
    if points:
        yield "dot", chart.points_name
    first, last = frame.span
    if any(first < step <= last for step in frame.resumed):
        yield "stroke restarted", "went on"
    if ((frame.skipped >= first) & (frame.skipped <= last)).any():
        yield "stroke skips", "skipped"


def _mark_y(scale: Scale) -> list[tuple[float, str]]:
    ticks = scale.ticks()
    words = [write_ticks([tick])[0] for tick in ticks] if scale.log else write_ticks(ticks)
    return [(1 - float(scale.place(tick)), said) for tick, said in zip(ticks, words, strict=True)]


def _mark_x(frame: Frame) -> list[tuple[float, str]]:
    ticks = list_steps(*frame.span)
    return [(float(frame.x(tick)) / WIDTH, said) for tick, said in zip(ticks, write_ticks(ticks), strict=True)]
