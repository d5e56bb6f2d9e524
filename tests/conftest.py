"""What a test starts in this process ends with it."""

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
