"""Where the time and the money went: a bar of all attempts, one of each, and a table, from the run's ledger."""

from collections.abc import Sequence
from html import escape

from launcher.page.charts import WIDTH, figure
from launcher.page.html import write_table
from training.ledger import PARTS, SECOND, Attempt, Spent, sum_parts, write_hours

# What a part is, as docs/health.md has it.
MEANING = {
    "useful": "steps that no attempt had taken before",
    "recomputed": "steps that an earlier attempt had taken",
    "checkpoints": "steps that waited for a copy, and the last one's way to disk",
    "evaluation": "on held-out text",
    "restarts": "from an end that was none until the next first step",
    "setup": "until the first step else",
    "ending": "weights, a sample of text",
    "other": "between steps; what a killed attempt did behind its last whole step",
}
SHOWN = 12  # attempts that have a bar of their own, the last ones
BAR = 100  # units of the svg, not pixels


def draw_ledger(attempts: Sequence[Attempt]) -> str:
    """The figure and the table; "" where no time has passed."""
    spent = sum_parts(list(attempts))
    hours, money = (sum(each[place] for each in spent.values()) for place in (0, 1))
    if not hours:
        return ""
    bars = [_draw_bar("all" if len(attempts) > 1 else "the attempt", {p: spent[p].hours for p in PARTS}, hours)]
    if len(attempts) > 1:
        single = [(f"attempt {each.attempt}, {each.ending}", _count_hours(each)) for each in attempts[-SHOWN:]]
        longest = max(sum(parts.values()) for _, parts in single) or 1.0
        bars += [_draw_bar(name, parts, longest) for name, parts in single]
    legend = [(f"cell p{place}", part) for place, part in enumerate(PARTS) if spent[part].hours]
    unit = write_hours(hours) + (f", cost {money:,.2f}" if money else "")
    note = f"Of {len(attempts)} attempts the last {SHOWN} have a bar each." if len(attempts) > SHOWN else ""
    return figure("Time of all devices", unit, legend, "".join(bars), note) + _write_spent(spent, hours, money)


def _write_spent(spent: dict[str, Spent], hours: float, money: float) -> str:
    """The table."""
    unit, count = ("device-hours", 1) if hours >= 1 else ("device-seconds", 3600)
    rows = [
        (part, f"{each.hours * count:,.2f}", f"{each.hours / hours:.1%}", f"{each.money:,.2f}", MEANING[part])
        for part, each in spent.items()
        if each.hours
    ]
    rows.append(("all", f"{hours * count:,.2f}", "100.0%", f"{money:,.2f}", ""))
    head = ("part", unit, "share", "cost", "what it is")
    shown = [column for column in range(len(head)) if money or head[column] != "cost"]
    return write_table(
        [head[column] for column in shown],
        [[row[column] for column in shown] for row in rows],
        "Time and money by part" if money else "Time by part",
        words=(0, len(shown) - 1),
    )


def _count_hours(attempt: Attempt) -> dict[str, float]:
    return {part: attempt.ranks * attempt.parts[part] / SECOND / 3600 for part in PARTS}


def _draw_bar(name: str, parts: dict[str, float], whole: float) -> str:
    """A bar whose full width is ``whole`` device-hours."""
    x, pieces = 0.0, []
    for place, part in enumerate(PARTS):
        width = parts[part] / whole * WIDTH
        if width > 0:
            said = escape(f"{part}: {write_hours(parts[part])}, {parts[part] / (sum(parts.values()) or 1):.1%}")
            pieces.append(
                f'<rect class="p{place}" x="{x:.2f}" width="{width:.2f}" height="{BAR}"><title>{said}</title></rect>'
            )
        x += width
    total = escape(f"{name}: {write_hours(sum(parts.values()))}")
    return (
        f'<div class="bar"><span>{total}</span><svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {BAR}" '
        f'preserveAspectRatio="none" role="img"><title>{total}</title>{"".join(pieces)}</svg></div>'
    )
