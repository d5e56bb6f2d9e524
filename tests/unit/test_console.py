"""What a terminal shows and what is kept of it: whole lines, without colours and renewals."""

import io

import pytest

from launcher.console import Copy


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        (["run a\n", "b"], "run a\n"),
        (["\r\x1b[2K\x1b[32m 1/9\x1b[0m", "\r\x1b[2Knote\n 1/9", "\r\x1b[2K 2/9", "\n\x1b[?25h"], "note\n 2/9\n"),
        (["one\r\ntwo\r\n"], "one\ntwo\n"),
        (["half ", "a line\n\n"], "half a line\n\n"),
    ],
)
def test_lines_that_stay_are_kept(pieces: list[str], kept: str) -> None:
    terminal, log = io.StringIO(), io.StringIO()
    copy = Copy(terminal, log)
    for piece in pieces:
        assert copy.write(piece) == len(piece)
    assert terminal.getvalue() == "".join(pieces) and log.getvalue() == kept
    assert copy.isatty() is False, "everything else is the terminal's"
