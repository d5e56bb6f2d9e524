"""What a test on a cluster needs: without it tests are skipped with the reason, or fail where it is required."""

import os

import pytest


def require(reason: str | None) -> None:
    """Skips the test if there is a reason why it cannot run; with SHOESTRING_CLUSTER=required, as in CI, it fails."""
    if reason is not None and os.environ.get("SHOESTRING_CLUSTER") == "required":
        pytest.fail(reason)
    if reason is not None:
        pytest.skip(reason)
