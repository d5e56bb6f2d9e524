"""Axes: from values to places, ticks at numbers that people like, and numbers as people write them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TICKS = 5  # about so many on an axis
DECADES = 1.5  # what is spread over more of them is drawn by its logarithm, where that may be
GIB = 2**30
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True, slots=True)
class Scale:
    """An axis from ``low`` to ``high``."""

    low: float
    high: float
    log: bool = False
    whole: bool = False  # of counts

    def place(self, value: np.ndarray | float) -> np.ndarray:
        """Shares of the axis, 0 at ``low`` and 1 at ``high``."""
        value = np.asarray(value, dtype=np.float64)
        if self.log:
            ends = math.log10(self.low), math.log10(self.high)
            return np.asarray((np.log10(np.maximum(value, self.low)) - ends[0]) / (ends[1] - ends[0]))
        return np.asarray((value - self.low) / (self.high - self.low))

    def ticks(self) -> list[float]:
        """Values to be marked, ascending."""
        if not self.log:
            return list_even(self.low, self.high, 1.0 if self.whole else 0.0)
        decades = math.log10(self.high / self.low)
        every, factors = max(1, round(decades / TICKS)), (1, 2, 5) if decades < 3 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found = [10.0**power * factor for power in powers if power % every == 0 for factor in factors]
        return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]


def span_values(values: np.ndarray, zero: bool = False, log: bool = False, whole: bool = False) -> Scale:
    """An axis for ``values`` that ends at ticks; from 0 with ``zero``; a logarithm's, if ``log`` and it helps."""
    values = values[np.isfinite(values)]
    if not len(values):
        return Scale(0.0, 1.0, whole=whole)
    low, high = float(values.min()), float(values.max())
    if log and low > 0 and math.log10(high / low) > DECADES:
        return Scale(10 ** (math.log10(low) - 0.05), 10 ** (math.log10(high) + 0.05), log=True)
    low = min(0.0, low) if zero else low
    if not high > low:
        low, high = (low, low + 1) if low == 0 else (low - abs(low) / 10, low + abs(low) / 10)
    step = max(choose_step((high - low) / TICKS), float(whole))
    return Scale(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, whole=whole)


def list_even(low: float, high: float, least: float = 0.0) -> list[float]:
    """About TICKS multiples of 1, 2 or 5 times a power of ten, at least ``least`` apart."""
    step = max(choose_step((high - low) / TICKS), least)
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [number * step for number in range(first, last + 1)]


def list_steps(first: float, last: float) -> list[float]:
    """Whole numbers from ``first`` to ``last`` to be marked."""
    return list_even(first, last, 1.0) or [first]


def choose_step(least: float) -> float:
    """The smallest of 1, 2, 5, 10, 20, .. (or of their tenths, ..) that is at least ``least``."""
    if not least > 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))


def write_ticks(ticks: Sequence[float]) -> list[str]:
    """Marks of an axis, short and alike: 0, 5k, 10k; 1e-4, 2e-4; 0.5, 1.0, 1.5."""
    most = max(map(abs, ticks), default=0.0)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else most or 1.0
    if most >= 1e4:
        unit, letter = next(each for each in UNITS if most >= each[0])
        return [f"{_trim(tick / unit, step / unit)}{letter}" if tick else "0" for tick in ticks]
    if 0 < most < 1e-3:
        return [_write_power(tick) if tick else "0" for tick in ticks]
    return [_trim(tick, step) for tick in ticks]


def write_number(value: float) -> str:
    """A measured value in about four digits: 2.1345, 12,345, 3.2e-5; a dash for what is none."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 1e-3 else f"{value:.3g}"


def write_loss(value: float) -> str:
    """Four digits behind the point, as a run prints them."""
    return f"{value:.4f}" if math.isfinite(value) else "–"


def write_prefix(value: float) -> str:
    """A count in about three digits: 12,345 as it is, 2.34 M, 671 B."""
    if not math.isfinite(value):
        return "–"
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.3g} {letter}"
    return f"{value:,.0f}"


def write_bytes(value: float) -> str:
    """Bytes in MiB or GiB."""
    if not math.isfinite(value):
        return "–"
    return f"{value / GIB:.2f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"


def _write_power(value: float) -> str:
    """Such as 1.5e-4."""
    power = math.floor(math.log10(abs(value)) + 1e-9)
    return f"{value / 10.0**power:.3g}e{power}"


def _trim(value: float, step: float) -> str:
    """As many digits as tell marks ``step`` apart from each other."""
    if abs(value) < step / 1000:
        return "0"
    digits = next(digits for digits in range(7) if digits == 6 or abs(round(step, digits) - step) < step / 1000)
    return f"{value:,.{digits}f}"
