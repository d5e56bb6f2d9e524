"""What all tests share: one thread a process, a page of text; what a test starts in this process ends with it."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """Cores are shared among tests: a thread for each process, unless a test or the caller says otherwise."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a page of text, and its tokens from the first test on."""
    from small_runs import write_text  # loads torch

    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
