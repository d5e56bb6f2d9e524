"""``shoestring report <run>``: one page on a run, for a browser: what it did, how evenly, and what that cost.

The page is one file that needs nothing else: no script, no font, no network. It is made of the run's folder alone: also
of a run that goes on, that has crashed, or that ran elsewhere.
"""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from launcher import cli, folder
from launcher.invocation import Invocation

SUMMARY = "write a page on a run: curves, experts, schedule, where time and money went"
ARGUMENTS = ("run",)


@dataclass(kw_only=True, slots=True)
class Config:
    """Where from and where to."""

    to: str | None = None  # the file to write; null: report.html in the run's folder
    folder: str = "runs"  # where runs are looked for by their id

    def __post_init__(self) -> None:
        if self.to == "":
            raise ValueError("to= must be a file to write, such as to=report.html, or null")


def run(config: Config, invocation: Invocation) -> int:
    """Writes the page and says where it is."""
    found = folder.open(invocation.arguments[0], config.folder)
    target = found.path / "report.html" if config.to is None else Path(config.to)
    check(target)
    # numpy loads in a moment, but a mistake is answered before it.
    from launcher.page.gather import gather
    from launcher.page.sections import write_run

    size = keep(target, write_run(gather(found.path)))
    print(f"{target}: {size / 1000:,.0f} kB, for any browser")
    return 0


def check(target: Path) -> None:
    """Raises ValueError where no file can be written, before anything is read."""
    if os.path.isdir(target):  # which has no objection to a name that is too long
        raise ValueError(f"to={target} must be a file, and is a folder; to={target / 'report.html'} would be one in it")
    if not os.path.isdir(target.parent):
        raise ValueError(f"to={target} must be in a folder that is there: {target.parent} is none")


def keep(target: Path, page: str) -> int:
    """``target`` has ``page``, or what it had before. Returns its bytes. ValueError where it cannot be written."""
    content = page.encode("utf-8", errors="replace")
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ValueError(f"to={target} cannot be written: {error.strerror}") from error
    return len(content)


if __name__ == "__main__":
    sys.exit(cli.main(["report", *sys.argv[1:]]))
