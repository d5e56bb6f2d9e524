"""What of a GPU is left to communication."""

import pytest
import torch

from parallel.overlap.lanes import reserve


def test_multiprocessors_are_left_to_communication_and_given_back() -> None:
    reserve(20, "cuda")
    assert torch._C._get_sm_carveout_experimental() == 20
    reserve(0, "cuda")
    assert torch._C._get_sm_carveout_experimental() is None


def test_a_processor_has_none_to_leave() -> None:
    with pytest.raises(ValueError, match=r"^parallel\.overlap\.multiprocessors=20 must be 0 with run\.device=cpu"):
        reserve(20, "cpu")
    reserve(0, "cpu")
