"""docs/pipeline.md says what is true: examples and commands print what it shows, and make the pictures it has."""

import doctest
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from launcher import cli
from parallel.pipeline.schedules import SCHEDULES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pipeline.md"
COMMANDS = re.findall(r"^`shoestring (schedule .*svg=.*)`$", PAGE.read_text(), re.MULTILINE)


def test_examples_print_what_the_page_shows() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.failed == 0 and result.attempted >= 18


def test_the_commands_print_what_the_page_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    block, refused = re.findall(r"^    \$ shoestring (.*)\n((?:    .*\n|\n)*)", PAGE.read_text(), re.MULTILINE)
    assert cli.main(shlex.split(block[0])) == 0
    assert capsys.readouterr().out.strip() == textwrap.dedent(block[1]).strip()
    assert cli.main(shlex.split(refused[0])) == 2
    assert capsys.readouterr().err.strip() == textwrap.dedent(refused[1]).strip()


def test_every_schedule_has_its_picture() -> None:
    names = [re.search(r"name=(\S+)", command)[1] for command in COMMANDS]
    assert names == list(SCHEDULES)
    assert re.findall(r"^!\[.*\]\(pipeline/(\w+)\.svg\)$", PAGE.read_text(), re.MULTILINE) == names
    assert {path.stem for path in (ROOT / "docs" / "pipeline").iterdir()} == set(names)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_picture_is_what_its_command_makes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs" / "pipeline").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main(shlex.split(command)) == 0
    (made,) = (tmp_path / "docs" / "pipeline").iterdir()
    assert made.read_text() == (ROOT / "docs" / "pipeline" / made.name).read_text()


def test_files_that_the_page_names_exist() -> None:
    named = set(re.findall(r"\b(?:parallel|benchmarks|tests)/[\w/]+\.py", PAGE.read_text()))
    assert len(named) >= 4 and not [name for name in named if not (ROOT / name).exists()]
