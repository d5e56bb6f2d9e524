"""What a person is shown: words for a step, a forecast, and not too many lines."""

import io
import math
import sys
from pathlib import Path

import pytest
from small_runs import make_run
from test_metrics import row

from model.count import flops_per_token
from training import view
from training.machine import Machine
from training.peaks import find_peak
from training.ramp import schedule_batches
from training.view import Gauge, PlainView, TerminalView, open_view, shorten, write_time


def gauge(device: str = "cpu", price: float = 0.0, steps: int = 100) -> Gauge:
    config = make_run(Path(), steps=steps)
    return Gauge(config, schedule_batches(config.run, 16), Machine(device, 1, 1, False, ""), price)


def flops() -> float:
    """Of the tokens in a second of ``row``'s speed."""
    return 2048 * flops_per_token(make_run(Path()).model, 16)


def test_a_step_in_words() -> None:
    line = gauge().describe(row(0))
    # 99 steps of 8 sequences are left, at 0.25 s a step.
    assert line == f"loss 2.500  2,048 tok/s  {flops() / 1e6:.0f} MFLOP/s  imbalance 0.50, 0 dead  0:25 left"
    assert "loss nan (skipped: not finite)" in gauge().describe(row(loss=math.nan, skipped=True))


def test_share_of_the_peak_where_it_is_known() -> None:
    rate = 2048 * 0.4 * 989e12 / flops()
    assert "40.0% MFU" in gauge("NVIDIA H100 80GB HBM3").describe(row(tokens_per_second=rate))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("AMD Instinct MI300X", 1307e12),
        ("cpu", None),
    ],
)
def test_peaks_by_the_name_a_device_gives_itself(name: str, peak: float | None) -> None:
    assert find_peak(name) == peak


def test_the_forecast_forgets_a_slow_start() -> None:
    shown = gauge()
    shown.describe(row(0, seconds=60.0))
    for step in range(1, 5):
        line = shown.describe(row(step))
    assert "0:24 left" in line


def test_money(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(view, "monotonic", lambda: now)
    shown = gauge(price=2.0)
    now += 1800
    assert shown.cost() == 1.0 and shown.describe(row()).endswith("cost 1.00")
    assert "cost" not in gauge().describe(row())


def test_plain_lines_are_few(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 1000.0
    monkeypatch.setattr(view, "monotonic", lambda: now)
    plain = PlainView(gauge(steps=50))
    for step in range(50):
        plain.show(row(step))
        now += 1.0
    plain.note("done")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:-1]] == [f"{step}/50" for step in (1, *range(6, 50, 5), 50)]
    assert lines[-1] == "done"


class Screen(io.StringIO):
    """A terminal 120 columns wide."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_line_that_renews_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    for key, value in {"COLUMNS": "120", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sys, "stdout", screen)
    shown = open_view(gauge(steps=2))
    assert isinstance(shown, TerminalView)
    with shown:
        shown.show(row(0))
        shown.note("held-out loss [red]2.5[/red]")
        shown.show(row(1))
    text = screen.getvalue()
    assert "held-out loss [red]2.5[/red]" in text
    assert "2/2" in text and "loss 2.500  2,048 tok/s" in text
    assert text.rstrip().endswith("\x1b[?25h")  # the cursor is back


def test_numbers_and_times_read_well() -> None:
    assert [shorten(x) for x in (3.1e11, 98.76e12, 1.5e6, 12.0)] == ["310 G", "98.8 T", "1.50 M", "12 "]
    assert [write_time(x) for x in (9.4, 75, 3661, 200_000)] == ["0:09", "1:15", "1:01:01", "2 days 7:33:20"]
