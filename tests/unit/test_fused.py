"""Where torch's fused operators could run, asked of a machine that is made up."""

from types import SimpleNamespace

import pytest
import torch

from parallel.collective_matmul import find_obstacle

DEVICE = torch.device("cuda")


def wire(patch: pytest.MonkeyPatch, matrix: list[list[int]]) -> None:
    """NVIDIA devices with these NVLinks between them."""
    patch.setattr(torch.version, "cuda", "13.0")
    wires = SimpleNamespace(matrix=matrix)
    patch.setattr(torch._C._distributed_c10d, "_detect_dma_connectivity", lambda device, kind: wires)


def test_they_run_where_all_devices_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    wire(monkeypatch, [[0, 18, 18], [18, 0, 18], [18, 18, 0]])
    assert find_obstacle(DEVICE, degree=2, ranks_per_node=4) == ""


def test_they_need_a_wire_between_any_two(monkeypatch: pytest.MonkeyPatch) -> None:
    wire(monkeypatch, [[0, 4, 0], [4, 0, 4], [0, 4, 0]])
    assert "NVLink" in find_obstacle(DEVICE, degree=2, ranks_per_node=4)


def test_they_stay_inside_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    wire(monkeypatch, [[0, 4], [4, 0]])
    assert "4 tp ranks do not, with 2 ranks on each" in find_obstacle(DEVICE, degree=4, ranks_per_node=2)


@pytest.mark.parametrize(("device", "said"), [("cpu", "on cpu"), ("xpu", "on xpu"), ("cuda", "on ROCm")])
def test_they_need_nvidia_devices(monkeypatch: pytest.MonkeyPatch, device: str, said: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert find_obstacle(torch.device(device), degree=2, ranks_per_node=2).endswith(said)
