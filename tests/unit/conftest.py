"""What tests of this folder share: one process in which Triton's kernels are interpreted."""

from collections.abc import Iterator

import pytest
from interpreted_start import Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    worker = Interpreter()
    yield worker
    worker.close()
