"""``shoestring schedule``: what each rank of a pipeline does when, without starting one. Loads no torch.

    shoestring schedule name=zb_h1 ranks=8 microbatches=16                      lists, bubbles, memory, a picture
    shoestring schedule name=dualpipev ranks=8 microbatches=20 cost.send=0.1 svg=dualpipev.svg trace=dualpipev.json
    shoestring schedule name=1f1b text=mine.txt; $EDITOR mine.txt; shoestring schedule file=mine.txt

The schedule is checked as a run would check it, then simulated with the costs given.
"""

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import cli
from launcher.invocation import Invocation
from parallel.config import ScheduleName
from parallel.pipeline.schedules import SCHEDULES, generate

if TYPE_CHECKING:
    from parallel.pipeline.action import Schedule
    from parallel.pipeline.simulate import Timeline

SUMMARY = "print, simulate and draw what each rank of a pipeline does when, without starting one"

MOST = 20_000_000  # actions: some minutes and 4 GB
SMALL = 16  # ranks: up to here all are listed
LISTED = 3000  # actions: up to here lists are printed whole
BEGINNING = 20  # actions of a list that is cut
TRACED = 100_000  # actions of a trace, about 20 MB
# What a run's configuration calls these things, and what they are called here.
WORDS = {
    "change run.micro_batch or run.global_batch": "change it by one",
    "lower run.micro_batch or parallel.pp": "raise it, or lower ranks",
    "parallel.pipeline.schedule": "name",
    "parallel.pipeline.virtual": "virtual",
    "parallel.pp": "ranks",
    "micro-batches=": "microbatches=",
}


@dataclass(kw_only=True, slots=True)
class CostConfig:
    """How long the operations of one stage take for one micro-batch, in any unit."""

    F: float = 1  # forward
    B: float = 2  # full backward
    I: float = 1  # the part of it that gives the input's gradient
    W: float = 1  # the part of it that gives the weights' gradients
    FB: float | None = None  # a forward and a full backward in an overlapped pair; null: F + B
    send: float = 0  # from the end of an action until another rank can read what it made


@dataclass(kw_only=True, slots=True)
class Config:
    """A schedule, costs, and files to write."""

    name: ScheduleName | None = None  # null: 1f1b
    ranks: int | None = None  # of the pipeline; null: 4
    microbatches: int | None = None  # of a step; null: 8
    virtual: int | None = None  # stages a rank, for the interleaved schedules; null: 1
    file: str | None = None  # a schedule of your own, a line a rank, in place of a name and numbers
    cost: CostConfig = field(default_factory=CostConfig)
    svg: str | None = None  # file for the picture
    trace: str | None = None  # file for a trace that ui.perfetto.dev opens, a unit of cost being a millisecond
    text: str | None = None  # file for the lists, which file= reads back

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("name", "ranks", "microbatches", "virtual")}
        for name, value in given.items():
            if self.file is not None and value is not None:
                raise ValueError(f"{name}={value} must be left out: file={self.file} says what each rank does")
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def run(config: Config, invocation: Invocation) -> int:
    """Prints what each rank does, how long it takes and what it keeps; writes the files that are asked for."""
    from parallel.pipeline.simulate import Cost, simulate

    cost = Cost(**{name: _whole(value) for name, value in asdict(config.cost).items() if value is not None})
    schedule = _take(config)
    timeline = simulate(schedule, cost)
    written = _write_files(config, timeline)
    print("\n".join([*_describe(timeline), "", *_list(schedule), "", *_draw(timeline), *written]))
    return 0


def _take(config: Config) -> "Schedule":
    """The schedule that is asked for, validated."""
    from parallel.pipeline.text import load
    from parallel.pipeline.validate import validate

    if config.file is not None:
        schedule = load(Path(config.file))
        try:
            validate(schedule)
        except ValueError as error:
            raise ValueError(f"file={config.file}: {error}") from None
        return schedule
    name = config.name or ScheduleName["1f1b"]
    ranks, microbatches, virtual = config.ranks or 4, config.microbatches or 8, config.virtual or 1
    actions = 3 * SCHEDULES[name].stages(ranks, virtual) * microbatches
    if actions > MOST:
        raise ValueError(
            f"ranks={ranks} and microbatches={microbatches} may make {actions:,} actions: must be at most {MOST:,}"
        )
    try:
        schedule = generate(name, ranks, microbatches, virtual)
    except ValueError as error:
        message = str(error)
        for theirs, ours in WORDS.items():
            message = message.replace(theirs, ours)
        raise ValueError(message) from None
    validate(schedule)
    return schedule


def _whole(value: float) -> float:
    """An integer where it is one: times then are, too, and exact."""
    return int(value) if value.is_integer() else value


def _describe(timeline: "Timeline") -> list[str]:
    """The whole in a line, and a table of ranks."""
    from parallel.pipeline.draw import list_stages, show, title

    cost = timeline.cost
    lines = [
        title(timeline),
        f"costs F={cost.F} B={cost.B} I={cost.I} W={cost.W} FB={cost.pair} send={cost.send}",
        "",
        f"{'rank':>6}{'actions':>9}{'busy':>10}{'bubble':>10}{'':>8}{'in its span':>13}{'activations':>13}   stages",
    ]
    world = timeline.schedule.ranks
    bubbles, gaps = timeline.bubbles, timeline.gaps
    for rank in range(world) if world <= SMALL else [*range(SMALL // 2), world - 1]:
        if rank == world - 1 and world > SMALL:
            lines.append(f"{'..':>6}")
        stages = list_stages(timeline, rank)
        lines.append(
            f"{rank:>6}{len(timeline.schedule.lists[rank]):>9}{show(timeline.busy[rank]):>10}{show(bubbles[rank]):>10}"
            f"{float(bubbles[rank]) / float(timeline.makespan):>8.1%}{show(gaps[rank]):>13}{timeline.peaks[rank]:>13}"
            f"   {' '.join(map(str, stages[:8]))}{' ..' if len(stages) > 8 else ''}"
        )
    lines.append("bubble: without work, of the whole step and between the rank's own first and last action;")
    lines.append("activations: the most that are alive at once, each of one stage and one micro-batch")
    return lines


def _list(schedule: "Schedule") -> list[str]:
    """What each rank does, in order: stage, op, micro-batch. Cut short where it is long."""
    whole = sum(map(len, schedule.lists)) <= LISTED and schedule.ranks <= SMALL
    digits = len(str(schedule.ranks - 1))
    lines = ["what each rank does: stage, op, micro-batch" + ("" if whole else " (text=FILE writes all of it)")]
    for rank in range(schedule.ranks) if whole else range(min(schedule.ranks, SMALL)):
        shown = schedule.lists[rank] if whole else schedule.lists[rank][:BEGINNING]
        more = len(schedule.lists[rank]) - len(shown)
        lines.append(f"{rank:>{digits}}  {' '.join(map(str, shown))}" + (f" .. {more:,} more" if more else ""))
    return lines if whole or schedule.ranks <= SMALL else [*lines, f".. {schedule.ranks - SMALL:,} more ranks"]


def _draw(timeline: "Timeline") -> list[str]:
    from parallel.pipeline.draw import render

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return render(timeline, shutil.get_terminal_size((160, 24)).columns, colour)


def _write_files(config: Config, timeline: "Timeline") -> list[str]:
    """Writes what is asked for; returns a line for each file. ValueError if one cannot be written."""
    from parallel.pipeline import draw, text, trace

    traced = draw.spread(timeline.schedule.ranks, max(1, TRACED * timeline.schedule.ranks // len(timeline.starts)))
    jobs: dict[str, Callable[[Path], Any]] = {
        "svg": lambda path: path.write_text(draw.write_svg(timeline)),
        "trace": lambda path: trace.write(path, {"simulated": timeline.rows(traced, 1e-3)}),
        "text": lambda path: path.write_text(text.render(timeline.schedule)),
    }
    left_out = {"svg": draw.cut(timeline).words, "trace": ""}
    if len(traced) < timeline.schedule.ranks:
        left_out["trace"] = f"{len(traced)} of {timeline.schedule.ranks} ranks"
    lines = []
    for key, write in jobs.items():
        name = getattr(config, key)
        if name is None:
            continue
        try:
            write(Path(name))
        except OSError as error:
            raise ValueError(f"{key}={name} cannot be written: {error.strerror}") from None
        words = f" (shown: {left_out[key]})" if left_out.get(key) else ""
        lines.append(f"{key}: {name}, {Path(name).stat().st_size / 1e3:,.1f} kB{words}")
    return ["", *lines] if lines else []


if __name__ == "__main__":
    sys.exit(cli.main(["schedule", *sys.argv[1:]]))
