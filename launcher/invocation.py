"""What a verb is told about the command line it was called with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Invocation:
    """The words of the command line, sorted, and the composed configuration they led to."""

    verb: str
    arguments: tuple[str, ...]  # words without "="
    overrides: tuple[str, ...]  # key=value
    yaml: str  # the composed configuration, nothing left to resolve
