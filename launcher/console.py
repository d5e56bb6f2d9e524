"""A terminal's text, kept in a file as the terminal keeps it: whole lines, no colours, no line that was renewed; and a
terminal that nobody sits at.
"""

import re
from typing import Any, TextIO

SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, movements, erasures


class Plain:
    """``stream``, which is no terminal whatever it says: mpirun gives its ranks one each."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Copy:
    """A stream that writes to ``terminal`` and keeps the lines that stay in ``log``.

    A line that is begun anew, as a progress bar's is, replaces what was there; it counts when it is ended.
    """

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log, self._line = terminal, log, ""

    def write(self, text: str) -> int:
        for piece in re.split(r"(\r?\n|\r)", SEQUENCE.sub("", text)):
            if piece == "\r":
                self._line = ""
            elif piece.endswith("\n"):
                self._log.write(f"{self._line}\n")
                self._log.flush()
                self._line = ""
            else:
                self._line += piece
        return self._terminal.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)
