"""``shoestring preflight``, and what ``shoestring train`` does with a machine that is unfit, as they are typed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nvml_library import build, surround
from test_train import SMALL
from torch.distributed import TCPStore

TRAIN = [sys.executable, "-m", "launcher.train", "verify=skip"]
PREFLIGHT = [sys.executable, "-m", "launcher.preflight"]
TEXT = "data.corpus=[text.txt]"
CLOCK = Path(__file__).parents[1] / "nvml" / "clock.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


def run(command: list[str], folder: Path, environment: dict[str, str] | None = None) -> tuple[int, str, str]:
    """The exit code, and what was printed."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 900)
    done = subprocess.run(
        [*command, TEXT, *SMALL], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_a_healthy_machine_passes_and_nothing_is_left(tmp_path: Path) -> None:
    code, out, err = run([*PREFLIGHT, "parallel.dp=2", "parallel.ep=2", "preflight.slow=30"], tmp_path)
    *table, last = out.splitlines()
    assert code == 0 and not err, out + err
    assert last.startswith("preflight: 1 machine, ") and " 0 findings, " in last
    names = {line[8:31].strip() for line in table}
    assert all(line.startswith("ok ") for line in table)
    inside = {f"{what} of {axis} inside" for what in ("bandwidth", "latency") for axis in ("dp", "ep")}
    others = {"disk", "free space", "memory", "shared memory", "open files", "clock of the machine", "versions"}
    assert names == {"product"} | inside | others
    assert not any((tmp_path / "runs").iterdir())


@pytest.mark.full
def test_a_lost_device_is_named_and_no_run_starts(tmp_path: Path, library: Path) -> None:
    """Alone, and before a run, whose id stays free."""
    states, node = tmp_path / "states.txt", os.uname().nodename
    states.write_text("system devices 4\n2 lost 1\n")
    line = f"{node}, device 2: device: has fallen off the bus"
    code, out, err = run([*PREFLIGHT, "run.id=mine"], tmp_path, surround(library, states))
    assert code == 1 and line in out and "FAILED  device " in out
    assert err.startswith(f"preflight: 1 finding, machine {node} unfit: ")
    assert not any((tmp_path / "runs").iterdir())

    code, out, err = run([*TRAIN, "run.id=mine", "preflight.when=start"], tmp_path, surround(library, states))
    assert code == 3 and line in out and "dmesg says why (Xid 79)" in out and "step 1/" not in out
    assert err.startswith(f"shoestring: preflight: 1 finding, machine {node} unfit: see above")
    assert not any((tmp_path / "runs").iterdir())


def test_ranks_that_are_started_here_leave_word_of_whom_to_exclude(tmp_path: Path, library: Path) -> None:
    states, node = tmp_path / "states.txt", os.uname().nodename
    states.write_text("system devices 4\n2 lost 1\n")
    words = ["parallel.dp=2", "run.id=mine", "preflight.when=start", "preflight.on_failure=exclude"]
    code, _, err = run([*TRAIN, *words, "preflight.slow=30"], tmp_path, surround(library, states))
    assert code == 3, err
    assert err.startswith(f"shoestring: preflight: 1 finding, machine {node} unfit: named in excluded.json")
    known = json.loads((tmp_path / "runs/mine/excluded.json").read_text())
    assert known == {node: "device 2: device: has fallen off the bus"}


def test_a_warned_run_trains(tmp_path: Path, library: Path) -> None:
    states = tmp_path / "states.txt"
    states.write_text("0 pcie_width 8\n")
    words = ["run.id=mine", "run.steps=1", "preflight.when=start", "preflight.on_failure=warn"]
    code, out, err = run([*TRAIN, *words], tmp_path, surround(library, states))
    assert code == 0 and "device 0: width of PCIe: x8 of x16" in out and not err
    assert (tmp_path / "runs/mine/weights").is_dir()


def test_one_machine_of_processors_is_not_checked_unless_asked(tmp_path: Path) -> None:
    code, out, _ = run([*TRAIN, "run.id=mine", "run.steps=1"], tmp_path)
    assert code == 0 and "preflight" not in out
    code, _, err = run([*TRAIN, "preflight.when=alone"], tmp_path)
    assert code == 2 and err.startswith("shoestring: preflight.when=alone is what shoestring preflight does: take auto")


@pytest.mark.full
def test_a_wrong_clock_is_named(tmp_path: Path) -> None:
    """Two machines that somebody else started a rank on each of: the second one's clock is a minute and a half late."""
    shim = tmp_path / "clock.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", str(CLOCK), "-o", str(shim)], check=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 900)
    ranks = []
    for rank in (0, 1):
        own = {"RANK": str(rank), "SLURMD_NODENAME": f"n{rank}"}
        wrong = {"LD_PRELOAD": str(shim), "CLOCK_SHIFT": "-90"} if rank else {}
        command = [*PREFLIGHT, TEXT, *SMALL, "preflight.slow=50", "preflight.clock=30", "data.folder=d"]
        ranks.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**os.environ, **meeting, **place, **own, **wrong},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    (out, err), other = (rank.communicate(timeout=240) for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1], (out, err, other)
    named = [line for line in out.splitlines() if line.startswith("n")]
    assert named == ["n1: clock of the machine: -90.00 s from the others"]
    assert "let chrony or ntpd set it" in out and other == ("", "")
