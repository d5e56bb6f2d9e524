"""Configuration of the checks of machines before a run: only the launcher sees it."""

from dataclasses import dataclass
from enum import StrEnum


class Verify(StrEnum):
    """What stands before a run of several ranks: a passed proof of its layout, made now where there is none, or not."""

    auto = "auto"
    require = "require"
    skip = "skip"


class When(StrEnum):
    """When machines are checked."""

    auto = "auto"  # before a run of several machines, or of accelerators
    start = "start"  # before every run
    never = "never"
    alone = "alone"  # and nothing is trained: what shoestring preflight does


class OnFailure(StrEnum):
    """What comes of a machine that is unfit."""

    stop = "stop"  # the run does not start
    warn = "warn"  # it starts all the same
    exclude = "exclude"  # it does not start, and names the machine in excluded.json, for a scheduler to leave it out


@dataclass(kw_only=True, slots=True)
class PreflightConfig:
    """What is checked of machines before a run (docs/preflight.md)."""

    when: When = When.auto
    on_failure: OnFailure = OnFailure.stop
    slow: float = 1.5  # a processor, disk or link that takes so many times as long as the median of its peers is named
    clock: float = 1.0  # seconds that a machine's clock may be off
    disk_megabytes: float | None = None  # a second, that a machine must write at least; null: peers alone are compared
    link_gigabits: float | None = None  # a second, that a machine must send at least; null: peers alone are compared

    def __post_init__(self) -> None:
        if not self.slow > 1:
            raise ValueError(f"preflight.slow={self.slow} must be above 1: how many times as long as its peers take")
        for name in ("clock", "disk_megabytes", "link_gigabits"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"preflight.{name}={value} must be positive{' or null' * (name != 'clock')}")
