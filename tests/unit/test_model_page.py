"""docs/model.md says what is true: its examples print what it shows, and the files it names exist."""

import doctest
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "model.md"


def test_examples_print_what_the_page_shows() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.failed == 0 and result.attempted > 20


def test_files_that_the_page_names_exist() -> None:
    text = PAGE.read_text()
    named = set(re.findall(r"\b(?:model|tests)/[\w/]+\.py", text))
    named |= {f"tests/unit/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)}
    assert len(named) > 15
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]
