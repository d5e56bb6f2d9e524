"""A checkpoint of 671 B parameters is exported as a stream: memory is that of the largest tensor, and 100 MB."""

from pathlib import Path

import pytest
from full_size import run

MEGABYTE = 10**6


@pytest.mark.full
@pytest.mark.timeout(580)
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process its peak memory")
def test_an_export_of_671_billion_parameters(fp8: bool) -> None:
    took = run(fp8)
    # Three times 671 B parameters, and those of MTP, of 4 bytes; every projection has scales in 8 bits.
    assert took["checkpoint"] > 3 * 4 * 671e9
    assert took["tensors"] == (91991 if fp8 else 46183) and took["taken"] == (54 if fp8 else 32)
    assert took["largest"] == 2 * 129280 * 7168
    assert took["largest"] < took["peak"] < took["largest"] + 100 * MEGABYTE
    # What is known of a checkpoint before anything is read: that grows with its pieces.
    assert took["plan"] < 10 * took["manifest"]
