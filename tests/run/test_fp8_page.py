"""docs/fp8.md says what is true: its mistake is answered as shown, and its files are there."""

import re
import shlex
from pathlib import Path

import pytest

from launcher import cli

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "fp8.md").read_text()


def test_the_mistake_is_answered_as_the_page_shows(capsys: pytest.CaptureFixture[str]) -> None:
    ((command, answer),) = re.findall(r"^    \$ shoestring (.*)\n    (.*)\n", TEXT, re.MULTILINE)
    assert cli.main(shlex.split(command)) != 0
    assert capsys.readouterr().err.strip() == answer


def test_files_are_there() -> None:
    files = set(re.findall(r"`([a-z_]+/[\w/]+\.py)`", TEXT)) | {
        f"docs/{page}" for page in re.findall(r"docs/(\w+\.md)", TEXT)
    }
    assert len(files) > 5 and all((ROOT / file).exists() for file in files)
