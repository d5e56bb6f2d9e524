"""What is read of devices, and what is found wrong with them, through a library that answers as NVIDIA's does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nvml_library import build, surround

from training.nvml import Device, find_visible

# One machine, in one state after the other: what its devices say, and what is wrong with them.
ASK = """
import json, os, sys
from dataclasses import asdict
from launcher.preflight import measure
from launcher.preflight.checks import Needs, list_checks
from launcher.preflight.desk import Desk
from launcher.preflight.judge import Sample, judge
from configs.preflight import PreflightConfig
from training.nvml import open_nvml

checks = list_checks(PreflightConfig(), Needs(0, 0, 0, 0, 4), ["version of driver", "version of NVML"], "cuda")
for states in json.load(sys.stdin):
    os.environ["NVML_STATES"] = states
    with open_nvml() as nvml:
        samples = {}
        for check, subject, value in measure.read_devices(Desk(None, 0, 4, 0, 4, "n1"), nvml):
            samples.setdefault(check, []).append(Sample(("n1",), subject, value))
        devices = [] if nvml is None else [asdict(nvml.read(index)) for index in range(nvml.count)]
    found = [[finding.check, finding.subject, finding.words] for finding in judge(checks, samples)]
    print(json.dumps({"devices": devices, "found": found, "driver": nvml and nvml.driver}))
"""
# What the library is told, and what is then found, of which device.
STATES = {
    "healthy": ("", []),
    "healthy and idle at its cap": ("* throttles 0x5", []),
    "corrected errors": ("1 ecc_corrected 12", []),
    "errors of long ago": ("1 ecc_aggregate 3", []),
    "ecc": ("2 ecc_volatile 3", [["uncorrected errors", "device 2", "3 of its memory"]]),
    "pending": (
        "1 remap_pending 1",
        [["rows to be replaced", "device 1", "a row of its memory is to be replaced at the next reset"]],
    ),
    "failed": (
        "3 remap_failed 1",
        [["rows not replaced", "device 3", "no row of its memory was left to replace a bad one"]],
    ),
    "lost": ("0 lost 1", [["device", "device 0", "has fallen off the bus"]]),
    "lost while it is read": ("1 lost 2", [["device", "device 1", "has fallen off the bus"]]),
    "missing": ("system devices 3", [["devices", "", "3, should be at least 4"]]),
    "hot": (
        "2 throttles 0x60\n2 temperature 88",
        [
            ["margin of temperature", "device 2", "1 C, should be at least 3 C"],
            ["slowed down", "device 2", "by software thermal slowdown, hardware thermal slowdown"],
        ],
    ),
    "braked": ("1 throttles 0x88", [["slowed down", "device 1", "by hardware slowdown, hardware power brake"]]),
    "capped": ("0 cap 350000", [["power cap", "device 0", "350 of 700 W"]]),
    "locked": ("3 sm_mhz 345", [["clock", "device 3", "345 MHz, its peers 1755 MHz"]]),
    "limited": ("3 sm_most 1410", [["highest clock", "device 3", "1410 MHz, 1980 MHz on 3 of 4"]]),
    "link": ("2 link4 0\n2 link5 0", [["links", "device 2", "16 NVLinks up, others 18 NVLinks up"]]),
    "width": ("1 pcie_width 8", [["width of PCIe", "device 1", "x8 of x16"]]),
    "generation": ("1 pcie_generation 3", [["generation of PCIe", "device 1", "3, others 5"]]),
    "silent": ("* ecc_volatile none\n* remap_pending none\n* links none\n* power none\n* temperature none", []),
    "unloaded": ("system unloaded 1", []),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


def ask(library: Path, folder: Path, states: dict[str, str]) -> dict[str, Any]:
    """What is said in each of ``states``, by one process."""
    paths = {name: folder / f"{number}.txt" for number, name in enumerate(states)}
    for name, path in paths.items():
        path.write_text(f"system devices 4\n{states[name]}\n")
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        input=json.dumps([str(path) for path in paths.values()]),
        env={name: value for name, value in surround(library, folder).items() if name != "CUDA_VISIBLE_DEVICES"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    return dict(zip(states, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.fixture(scope="module")
def answers(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return ask(library, tmp_path_factory.mktemp("states"), {name: words for name, (words, _) in STATES.items()})


@pytest.mark.parametrize("state", STATES)
def test_what_is_wrong_is_found_and_nothing_else(answers: dict[str, Any], state: str) -> None:
    assert answers[state]["found"] == STATES[state][1]


def test_a_device_is_read_as_it_is(answers: dict[str, Any]) -> None:
    assert answers["healthy"]["devices"][3] == {
        "index": 3,
        "fault": "",
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-00000003-2b5c-4d1e-8f00-0123456789ab",
        "ecc_volatile": 0,
        "ecc_aggregate": 0,
        "remapped_correctable": 0,
        "remapped_uncorrectable": 0,
        "remap_pending": False,
        "remap_failed": False,
        "temperature": 41,
        "slowdown_temperature": 89,
        "throttles": [],
        "watts": 512.345,
        "cap_watts": 700.0,
        "default_cap_watts": 700.0,
        "sm_mhz": 1755,
        "sm_mhz_most": 1980,
        "memory_mhz": 2619,
        "memory_mhz_most": 2619,
        "links": [True] * 18,
        "pcie_generation": 5,
        "pcie_generation_most": 5,
        "pcie_width": 16,
        "pcie_width_most": 16,
        "utilisation": 93,
        "memory_used": 64424509440,
        "memory_total": 85520809984,
        "joules": 123456.789,
    }
    assert answers["healthy"]["driver"] == "580.65.06"
    assert answers["errors of long ago"]["devices"][1]["ecc_aggregate"] == 3


def test_what_a_device_cannot_tell_is_nothing_and_the_rest_is_read(answers: dict[str, Any]) -> None:
    device = answers["silent"]["devices"][0]
    nothing = {name for name, value in device.items() if value is None}
    told = {"ecc_volatile", "links", "watts", "temperature"}
    remapped = {"remapped_correctable", "remapped_uncorrectable", "remap_pending", "remap_failed"}
    assert nothing == told | remapped and device["sm_mhz"] == 1755


def test_a_lost_device_tells_nothing_but_that(answers: dict[str, Any]) -> None:
    lost, *others = answers["lost"]["devices"]
    assert {name: value for name, value in lost.items() if value is not None} == {
        "index": 0,
        "fault": "has fallen off the bus",
    }
    assert len(others) == 3 and not any(device["fault"] for device in others)


def test_without_a_driver_there_are_no_devices(answers: dict[str, Any]) -> None:
    assert answers["unloaded"] == {"devices": [], "found": [], "driver": None}


def test_older_drivers_are_asked_as_they_know_it(tmp_path: Path) -> None:
    """They have neither nvmlDeviceGetTemperatureV nor nvmlDeviceGetCurrentClocksEventReasons."""
    states = {"hot": STATES["hot"][0], "old": "system driver 470.82.01"}
    answers = ask(build(tmp_path, "-DOLD"), tmp_path, states)
    assert answers["hot"]["found"] == STATES["hot"][1]
    assert answers["old"]["driver"] == "470.82.01" and answers["old"]["devices"][0]["temperature"] == 41


def test_devices_are_those_that_cuda_shows() -> None:
    devices = [Device(index=index, uuid=f"GPU-{index}a") for index in range(4)]

    def see(words: str) -> list[int]:
        return [device.index for device in find_visible({"CUDA_VISIBLE_DEVICES": words}, devices)]

    assert see("2,0") == [2, 0] and see("GPU-3,1") == [3, 1] and see("") == [] and see("1,9,2") == see("1, -1,2") == [1]
    assert find_visible({}, devices) == devices and "NVML_STATES" not in os.environ
