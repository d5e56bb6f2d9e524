"""Heat maps: a cell for each layer and time, or for each layer and expert, in few colours that a legend explains.

Cells of a colour are one path, and those beside each other one rectangle of it: of 59 layers and 256 experts there are
15,000, and the page stays small. Colours are classes m0, m1, .. (a sequence) and r0, r1, .. (from cold to hot).
"""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import numpy as np

from launcher.page.charts import WIDTH, figure, plot
from launcher.page.read import Loads
from launcher.page.scale import list_steps, write_ticks
from launcher.page.thin import Span, squeeze

VIOLATIONS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # where one colour ends and the next begins
RELATIVE = (0.25, 0.5, 0.8, 1.25, 2.0, 4.0)  # the same of load / mean; experts without a token have one of their own
TIMES, EXPERTS = 240, 512  # columns
ROW = 100  # units of the svg for a layer


def draw_violations(loads: Loads, layers: Sequence[str], span: Span) -> str:
    """Layers down, time to the right: how uneven each layer was at the steps that were recorded."""
    edges = _find_edges(loads.steps, span)
    if len(loads.steps) > TIMES:
        parts = np.array_split(np.arange(len(loads.steps)), TIMES)
        edges = [edges[part[0]] for part in parts] + [edges[-1]]
    table = squeeze(loads.violations.T, TIMES)
    rows = []
    for name, values in zip(layers, loads.violations.T, strict=True):
        worst = int(values.argmax())
        rows.append(
            f"layer {name}: {float(values[-1]):.3g} at last, at most {float(values[worst]):.3g} "
            f"in step {int(loads.steps[worst]):,}"
        )
    title = "Maximal violation of each layer"
    svg = _draw("m", np.searchsorted(VIOLATIONS, table, side="right"), edges, (title, rows))
    first, last = span
    ticks = list_steps(first, last)
    places = [(tick - first) / max(1.0, last - first) for tick in ticks]
    marks = list(zip(places, write_ticks(ticks), strict=True))
    inside = plot(svg, _name_rows(layers), marks, _size(len(layers)))
    return figure(title, "layer over step", _explain("m", VIOLATIONS), inside)


def draw_experts(loads: Loads, layers: Sequence[str]) -> str:
    """Layers down, experts to the right: what each got of the last recorded step, over the mean of its layer."""
    mean = loads.experts.mean(axis=1, keepdims=True)
    relative = loads.experts / np.where(mean > 0, mean, 1)
    table = squeeze(relative, EXPERTS, usual=1.0)
    count, shown = relative.shape[1], table.shape[1]
    rows = []
    for name, values in zip(layers, relative, strict=True):
        dead = int((values == 0).sum())
        rows.append(
            f"layer {name}: expert {int(values.argmax())} has most, {float(values.max()):.3g} times the mean; "
            f"expert {int(values.argmin())} least, {float(values.min()):.3g}"
            + (f"; {dead} without a token" if dead else "")
        )
    title = f"Load of each expert in step {int(loads.steps[-1]):,}"
    levels = np.where(table > 0, 1 + np.searchsorted(RELATIVE, table, side="right"), 0)
    svg = _draw("r", levels, np.linspace(0, WIDTH, shown + 1).tolist(), (title, rows))
    ticks = list_steps(0, count - 1)
    marks = [((tick + 0.5) / count, f"{tick:.0f}") for tick in ticks]
    legend = [("cell r0", "no token"), *((f"cell r{int(k[-1]) + 1}", words) for k, words in _explain("m", RELATIVE))]
    inside = plot(svg, _name_rows(layers), marks, _size(len(layers)))
    note = f"of neighbours that share one of {shown} columns, the one farthest from the mean" if shown < count else ""
    return figure(title, "layer over expert, times the mean of the layer", legend, inside, note)


def _find_edges(steps: np.ndarray, span: Span) -> list[float]:
    """[T] -> [T + 1]: columns meet half way between the steps that they stand for."""
    first, last = span
    x = (steps.astype(np.float64) - first) / max(1.0, last - first) * WIDTH
    if len(x) == 1:
        return [0.0, float(WIDTH)]
    between = (x[:-1] + x[1:]) / 2
    ends = [2 * x[0] - between[0], *between.tolist(), 2 * x[-1] - between[-1]]
    return np.clip(ends, 0, WIDTH).tolist()


def _draw(kind: str, levels: np.ndarray, edges: Sequence[float], said: tuple[str, Sequence[str]]) -> str:
    """[R, C] of colours -> the svg. ``edges`` [C + 1]; ``said``: its title, and a line for each row."""
    title, rows = said
    d: dict[int, list[str]] = {}
    for row, values in enumerate(levels):
        starts = np.flatnonzero(np.diff(values, prepend=-1))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True):
            x, width = edges[start], edges[end] - edges[start]
            if width > 0:
                d.setdefault(int(values[start]), []).append(
                    f"M{_round(x)} {row * ROW}h{_round(width)}v{ROW}h-{_round(width)}z"
                )
    height = ROW * len(levels)
    cells = "".join(f'<path class="{kind}{level}" d="{"".join(parts)}"/>' for level, parts in sorted(d.items()))
    hover = "".join(
        f'<rect class="hover" y="{row * ROW}" width="{WIDTH}" height="{ROW}"><title>{escape(words)}</title></rect>'
        for row, words in enumerate(rows)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" preserveAspectRatio="none" role="img" '
        f'class="map"><title>{escape(title)}</title><desc>{escape("; ".join(rows))}</desc>{cells}{hover}</svg>'
    )


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _name_rows(layers: Sequence[str]) -> list[tuple[float, str]]:
    """Names of layers, as many as there is room for."""
    every = max(1, -(-len(layers) // 20))
    return [((row + 0.5) / len(layers), name) for row, name in enumerate(layers) if row % every == 0]


def _size(layers: int) -> str:
    """How high a map is."""
    return f"--high:{max(layers * (22 if layers <= 12 else 9), 44)}px"


def _explain(kind: str, bounds: Sequence[float]) -> list[tuple[str, str]]:
    """The legend: a class and its words for each colour."""
    words = [f"< {bounds[0]:g}"]
    words += [f"{low:g}–{high:g}" for low, high in pairwise(bounds)]
    return [(f"cell {kind}{level}", said) for level, said in enumerate([*words, f"≥ {bounds[-1]:g}"])]
