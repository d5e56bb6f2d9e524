"""How far along: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

PAUSE = 5.0  # seconds between lines


@contextmanager
def show(what: str, done: int, total: int, report: Callable[[str], None]) -> Iterator[Callable[[int], None]]:
    """Shows progress from ``done`` to ``total`` bytes; call what it gives with each number of bytes done."""
    if sys.stdout.isatty():
        from rich import progress as bar

        columns = (bar.BarColumn(), bar.DownloadColumn(), bar.TransferSpeedColumn(), bar.TimeRemainingColumn())
        with bar.Progress("{task.description}", *columns, transient=True) as progress:
            task = progress.add_task(what, total=total, completed=done)
            yield lambda count: progress.advance(task, count)
        return
    started = said = monotonic()
    here = 0

    def advance(count: int) -> None:
        nonlocal here, said
        here += count
        now = monotonic()
        if now - said >= PAUSE:
            said = now
            rate = here / (now - started)
            report(f"{what}: {(done + here) / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate / 1e6:,.1f} MB/s")

    yield advance
