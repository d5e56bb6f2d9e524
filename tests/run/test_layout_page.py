"""docs/layout.md says what is true: its examples and its command print what it shows; files and keys exist."""

import doctest
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from launcher import cli

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "layout.md"


def test_examples_print_what_the_page_shows() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.failed == 0 and result.attempted >= 9


def test_the_commands_print_what_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the page has a line of dots, lines are left out; behind the last that is shown, there may be more then."""
    blocks = re.findall(r"^    \$ shoestring (.*)\n((?:    .*\n|\n)*)", PAGE.read_text(), re.MULTILINE)
    assert len(blocks) == 2
    for command, block in blocks:
        assert cli.main(shlex.split(command)) == 0
        printed = capsys.readouterr().out.strip() + "\n"
        first, *others = re.split(r"^ *\.\.\.\n", textwrap.dedent(block).strip() + "\n", flags=re.MULTILINE)
        assert printed.startswith(first) and (others or printed == first)
        for part in others:
            assert part in (printed := printed.partition(first)[2])
            first = part


def test_commands_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"`shoestring (layout .*?)`", PAGE.read_text())
    assert commands
    for command in commands:
        assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().err == ""


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"\b(?:parallel|benchmarks)/[\w/]+\.py", PAGE.read_text()))
    assert len(named) >= 4 and not [name for name in named if not (ROOT / name).exists()]


def test_keys_that_the_page_names_exist() -> None:
    from configs.schema import RunConfig
    from launcher.keys import table

    named = set(re.findall(r"`((?:parallel|model|data|run|cluster)\.[\w.]+)`", PAGE.read_text()))
    sections = {key.rpartition(".")[0] for key in table(RunConfig)}
    assert len(named) > 8 and named <= {*table(RunConfig), *sections}
