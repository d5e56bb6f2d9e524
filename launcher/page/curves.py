"""The pictures of a run's record: what is drawn, with which axes, from which series."""

from collections.abc import Iterator
from dataclasses import replace

from launcher.page.charts import Chart, Frame, Line, draw
from launcher.page.gather import Run
from launcher.page.html import write_section, write_text
from launcher.page.maps import draw_experts, draw_violations
from launcher.page.scale import GIB

LATE = 50  # steps: from so many on, the second half of the loss is drawn by itself


def make_frame(run: Run) -> Frame:
    """The steps that all charts show: those of the record."""
    steps = run.record.steps
    span = (float(steps[0]), float(steps[-1])) if len(steps) else (1.0, 1.0)
    return Frame(steps, span, run.record.resumed, steps[run.record.series["skipped"] > 0])


def write_curves(run: Run, frame: Frame) -> str:
    """Loss, rate, norm, speed, memory."""
    if not len(frame.steps):
        return write_section("Curves", write_text("The record has no step yet."))
    return write_section("Curves", *_draw_curves(run, frame), grid=True)


def _draw_curves(run: Run, frame: Frame) -> Iterator[str]:
    series = run.record.series
    loss = Chart(
        title="Loss",
        unit="nats a token",
        lines=[Line(name="loss", values=series["loss"], mean=True)],
        points=run.record.held_out,
        points_name="held out",
        log=True,
    )
    yield draw(loss, frame)
    if len(frame.steps) >= LATE:
        half = float(frame.steps[len(frame.steps) // 2])
        yield draw(replace(loss, title="Loss, second half"), frame.cut(half))
    norm = Line(name="norm", values=series["grad_norm"], mean=True)
    speed = Line(name="speed", values=series["tokens_per_second"], mean=True)
    memory = Line(name="memory", values=series["peak_memory"] / GIB)
    rate = Line(name="rate", values=series["lr"])
    yield draw(Chart(title="Learning rate", unit="", lines=[rate], zero=True), frame)
    yield draw(Chart(title="Gradient norm", unit="before clipping", lines=[norm], log=True), frame)
    yield draw(Chart(title="Speed", unit="tokens a second", lines=[speed], zero=True), frame)
    yield draw(Chart(title="Memory", unit="GiB, peak of rank 0 so far", lines=[memory], zero=True), frame)


def write_balance(run: Run, frame: Frame) -> str:
    """How evenly experts are used; "" of a dense model, and before the first step."""
    series, loads = run.record.series, run.record.loads
    if not run.config.model.routed_blocks() or not len(frame.steps):
        return ""
    worst = Line(name="worst layer", values=series["violation_worst"], colour="b", mean=True)
    mean = Line(name="mean of layers", values=series["violation_mean"], mean=True)
    violation = Chart(title="Maximal violation", unit="fullest expert / mean - 1", lines=[worst, mean], zero=True)
    dead = Chart(
        title="Dead experts",
        unit="without a token, of all layers",
        lines=[Line(name="dead", values=series["dead_experts"])],
        zero=True,
        whole=True,
    )
    parts = [f'<div class="grid">{draw(violation, frame)}{draw(dead, frame)}</div>']
    if loads is None:
        parts.append(write_text("The record has no loads of single experts.", "note"))
    else:
        layers = name_layers(run, loads.violations.shape[1])
        parts += [draw_violations(loads, layers, frame.span), draw_experts(loads, layers)]
    return write_section("Balance of experts", *parts)


def name_layers(run: Run, count: int) -> list[str]:
    """The routed layers of the model; those of multi-token prediction by their depth."""
    model = run.config.model
    names = [
        str(block) if block < model.num_layers else f"MTP {block - model.num_layers + 1}"
        for block in model.routed_blocks()
    ]
    return names if len(names) == count else [str(row) for row in range(count)]
