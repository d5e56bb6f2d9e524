"""That a run does not start, for a machine that it has is unfit; and how others hear of it."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from training.checkpoint.place import replace_text

EXCLUDED = "excluded.json"  # in a run's folder: {"node": "why"}
UNFIT = 3  # a rank's exit code


class UnfitError(ValueError):
    """A machine is unfit, and the run does not start. The text is for its user."""


def exclude(folder: Path, unfit: Mapping[str, str]) -> None:
    """Adds machines to those that the next attempt of the run in ``folder`` does without."""
    replace_text(folder / EXCLUDED, json.dumps({**read_excluded(folder), **unfit}, indent=1) + "\n")


def read_excluded(folder: Path) -> dict[str, str]:
    """The machines that the run in ``folder`` does without, and why."""
    with suppress(OSError, ValueError):
        return dict(json.loads((folder / EXCLUDED).read_text(encoding="utf-8")))
    return {}
