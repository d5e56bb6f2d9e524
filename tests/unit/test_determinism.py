"""Where and how a run computes: device, threads, deterministic mode, and whether compiling pays."""

import mmap
import shutil
from pathlib import Path

import pytest
import torch
from small_models import make_config
from small_runs import make_run

from training import compilation, determinism
from training.compilation import decide_compile
from training.config import Compile, Device


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the process as it was."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
def test_devices_without_an_accelerator() -> None:
    assert determinism.choose_device(Device.auto) == determinism.choose_device(Device.cpu) == torch.device("cpu")
    for device in (Device.cuda, Device.xpu):
        with pytest.raises(ValueError, match=rf"run\.device={device}: .* use auto or cpu"):
            determinism.choose_device(device)


def test_threads_are_set_for_the_process() -> None:
    before = torch.get_num_threads()
    try:
        assert determinism.fix_numerics(torch.device("cpu"), 3) == 3 == torch.get_num_threads()
        assert (
            determinism.fix_numerics(torch.device("cpu"), None) == determinism.count_cores() == torch.get_num_threads()
        )
    finally:
        torch.set_num_threads(before)


def test_deterministic_mode_is_for_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what would be set, and stay
    threads = torch.get_num_threads()
    try:
        determinism.fix_numerics(torch.device("cpu"), threads)
        assert not torch.are_deterministic_algorithms_enabled()
        determinism.fix_numerics(torch.device("cuda"), threads)
        assert torch.are_deterministic_algorithms_enabled()
        determinism.fix_numerics(torch.device("cuda"), threads, deterministic=False)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_peak_memory_grows() -> None:
    before = determinism.measure_peak_memory(torch.device("cpu"))
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    # As much as tests before this one had held at once, and 64 MiB.
    kept = torch.ones((before - resident + (64 << 20)) // 4)
    assert determinism.measure_peak_memory(torch.device("cpu")) > before > 1 << 24 and kept.numel()


SHORT = make_run(Path())
LONG = make_run(Path(), model=make_config(vocab_size=264, hidden=512, ffn=2048), steps=10**7)


def test_compiles_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_find_missing", lambda device: None)
    assert decide_compile(LONG, "cpu")[0] and decide_compile(LONG, "cpu")[1].startswith("compiled: ")
    assert not decide_compile(SHORT, "cpu")[0] and "would save about 0 s" in decide_compile(SHORT, "cpu")[1]


@pytest.mark.parametrize("choice", [Compile.on, Compile.off])
def test_compiles_as_told(choice: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_find_missing", lambda device: None)
    for config in (make_run(Path(), compile=choice), make_run(Path(), steps=10**9, compile=choice)):
        assert decide_compile(config, "cpu")[0] is (choice is Compile.on)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "g++")
    assert decide_compile(LONG, "cpu") == (False, "eager: compiling needs a C++ compiler (g++)")
    with pytest.raises(ValueError, match=r"run\.compile=on needs a C\+\+ compiler \(g\+\+\); install it or"):
        decide_compile(make_run(Path(), compile=Compile.on), "cpu")


def test_without_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compilation.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Python's C headers" in decide_compile(LONG, "cpu")[1]
    (tmp_path / "Python.h").touch()
    assert decide_compile(LONG, "cpu")[0]
