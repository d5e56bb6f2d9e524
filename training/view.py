"""What a person sees of a run: one live line on a terminal, a line every few seconds anywhere else.

    120/300 ━━━━━━━━╸━━━━━━━━━  loss 2.314  12,345 tok/s  310 GFLOP/s  imbalance 0.42, 0 dead  0:32 left  cost 0.01

Speed is model FLOPs (no recomputation, no padding) a second: as a share of the device's peak where that is known (MFU).
The imbalance is that of the worst layer: 0 when all experts get the same.
"""

import sys
from collections import deque
from time import monotonic
from typing import Protocol, Self

from configs.schema import TrainConfig
from model.count import flops_per_token
from training.clock import write_time
from training.machine import Machine
from training.metrics import StepRow
from training.peaks import find_peak
from training.ramp import BatchSchedule

PAUSE = 5.0  # seconds between plain lines
WINDOW = 20  # steps whose speed the forecast is made from


class Gauge:
    """Turns a step's row into words. One for a run: it remembers when it began, and the last steps' speed."""

    def __init__(
        self, config: TrainConfig, schedule: BatchSchedule, machine: Machine, price: float, earlier: float = 0.0
    ) -> None:
        """``price`` is that of all devices used, an hour; ``earlier`` the seconds before the run was resumed."""
        self.steps, self.price = config.run.steps, price
        self._flops = flops_per_token(config.model, config.data.sequence_length)
        peak = find_peak(machine.device)
        self._peak = peak and peak * machine.ranks
        self._schedule = schedule
        self._started = monotonic() - earlier
        self._pace: deque[float] = deque(maxlen=WINDOW)  # seconds a sequence

    def elapsed(self) -> float:
        """Seconds so far."""
        return monotonic() - self._started

    def cost(self) -> float:
        """Money spent so far."""
        return self.price * self.elapsed() / 3600

    def describe(self, row: StepRow) -> str:
        """The row in a line."""
        parts = [f"loss {row.loss:.3f}" + (" (skipped: not finite)" if row.skipped else "")]
        parts += [f"{row.tokens_per_second:,.0f} tok/s", self._speed(row)]
        parts.append(f"imbalance {row.violation_worst:.2f}, {row.dead_experts} dead")
        parts.append(f"{write_time(self._remaining(row))} left")
        if self.price:
            parts.append(f"cost {self.cost():.2f}")
        return "  ".join(parts)

    def _speed(self, row: StepRow) -> str:
        speed = row.tokens_per_second * self._flops
        return f"{100 * speed / self._peak:.1f}% MFU" if self._peak else f"{shorten(speed)}FLOP/s"

    def _remaining(self, row: StepRow) -> float:
        """Seconds to the end at the median speed of the last steps: the first one, which compiles, counts little."""
        self._pace.append(row.seconds / self._schedule.size(row.step))
        return sorted(self._pace)[len(self._pace) // 2] * (self._schedule.before(self.steps) - row.cursor)


class View(Protocol):
    """Where the run is shown."""

    def note(self, text: str) -> None:
        """A line that stays."""

    def show(self, row: StepRow) -> None:
        """The step that was just taken."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


class PlainView:
    """Lines, for files and pipes: the first and the last step, and one now and then between them."""

    def __init__(self, gauge: Gauge) -> None:
        self._gauge, self._said = gauge, -PAUSE

    def note(self, text: str) -> None:
        print(text, flush=True)

    def show(self, row: StepRow) -> None:
        text, step = self._gauge.describe(row), row.step + 1
        if step in (1, self._gauge.steps) or monotonic() - self._said >= PAUSE:
            self._said = monotonic()
            self.note(f"step {step}/{self._gauge.steps}  {text}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class TerminalView:
    """One line that renews itself, below the lines that stay."""

    def __init__(self, gauge: Gauge) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
        self._gauge = gauge
        self._progress = Progress(*columns, refresh_per_second=4)
        self._task = self._progress.add_task("starting", total=gauge.steps)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, row: StepRow) -> None:
        self._progress.update(self._task, completed=row.step + 1, description=self._gauge.describe(row))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def open_view(gauge: Gauge) -> View:
    """The view that suits standard output: of several ranks, all but the first have a log there."""
    return TerminalView(gauge) if sys.stdout.isatty() else PlainView(gauge)


def shorten(value: float) -> str:
    """Three digits and a prefix for a unit to follow: 3.1e11 -> ``310 G``."""
    for prefix, unit in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= unit:
            scaled = value / unit
            digits = 0 if scaled >= 100 else 1 if scaled >= 10 else 2
            return f"{scaled:.{digits}f} {prefix}"
    return f"{value:.0f} "
