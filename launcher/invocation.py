"""What a verb is told about the command line it was called with."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Invocation:
    """The words of the command line, sorted, and the composed configuration they led to."""

    verb: str
    arguments: tuple[str, ...]  # words without "="
    overrides: tuple[str, ...]  # key=value
    yaml: str  # the composed configuration, nothing left to resolve
    presets: str | None = None  # the folder behind --config-dir
    keys: Any = None  # what the verb takes beside a run's configuration: its ``Keys``
    dry_run: bool = False  # say what would be done, and do nothing

    @property
    def command(self) -> tuple[str, ...]:
        """The words that lead to this configuration again."""
        flag = () if self.presets is None else ("--config-dir", self.presets)
        return ("shoestring", *self.verb.split(), *self.arguments, *self.overrides, *flag)
