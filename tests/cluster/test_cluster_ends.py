"""When a test cluster's process ends, however it ends, nothing of the cluster is left: no process, network or mount."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
from client import until
from needed import require

import slurm

SHELL = Path(__file__).with_name("shell.py")
# A batch script that leaves a child behind, which leaves its session, and is no child of any daemon of Slurm's.
JOB = "sbatch --output=/dev/null --wrap 'setsid sleep 4711 & sleep 4711'"
OTHERS = ("/usr/bin", "/usr/local/bin")  # where an interpreter may be that every user can run
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]


def read_parents() -> dict[str, str]:
    """Every process of this machine, with what started it or has taken it over."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[path.parent.name] = path.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return parents


def find_below(process: int) -> list[str]:
    """All processes that descend from one, itself left out."""
    parents, found = read_parents(), [str(process)]
    for number in found:
        found += [child for child, parent in parents.items() if parent == number]
    return found[1:]


def read_command(number: str) -> str:
    try:
        return Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def read_spaces(number: str) -> set[str]:
    return {os.readlink(path) for path in Path(f"/proc/{number}/ns").iterdir()}


def find_holders(spaces: set[str]) -> list[str]:
    """Processes that live in any of these namespaces."""
    held = []
    for number in read_parents():
        try:
            held += [read_command(number)] if read_spaces(number) & spaces else []
        except OSError:  # has ended, or is none of ours
            continue
    return held


def look_around() -> tuple[str, str]:
    links = subprocess.run(["ip", "-oneline", "link"], capture_output=True, text=True, check=True).stdout
    return Path("/proc/self/mounts").read_text(), links


@pytest.fixture
def short_path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(params=["namespaces", "loopback"])
def held(request: pytest.FixtureRequest, short_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a cluster, on which a job runs and a command waits for a line."""
    kind = loopback if request.param == "loopback" else slurm
    require(kind.can_make())
    words = ["--loopback"] if kind is loopback else []
    command = [sys.executable, SHELL, "--nodes", "2", *words, "bash", "-c", f"{JOB}; read; exit 3"]
    environment = os.environ | {"TMPDIR": str(short_path)}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline().startswith("Submitted")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_nothing_is_left(held: subprocess.Popen[str], how: signal.Signals | None, short_path: Path) -> None:
    before = look_around()
    assert until(lambda: [read_command(number) for number in find_below(held.pid)].count("sleep 4711") == 2, 30)
    below = find_below(held.pid)
    assert any("slurmctld" in read_command(number) for number in below)
    spaces = set().union(*map(read_spaces, below)) - read_spaces("self")
    if how is None:
        assert held.stdin is not None
        held.stdin.write("\n")
        held.stdin.flush()
    else:
        held.send_signal(how)
    assert held.wait(30) == {signal.SIGKILL: -9, signal.SIGTERM: 143, None: 3}[how]
    assert until(lambda: not find_holders(spaces), 30), find_holders(spaces)
    assert until(lambda: not {number for number in below if read_command(number)}, 30)
    assert until(lambda: look_around() == before, 30)
    assert how is signal.SIGKILL or not list(short_path.iterdir())


def find_interpreter() -> str | None:
    """An interpreter that somebody without rights can run on this checkout."""
    for name in filter(None, (sys.executable, *(shutil.which("python3", path=path) for path in OTHERS))):
        line = [*NOBODY, "bash", "-c", f"'{name}' -c 'import json, sys; assert sys.version_info >= (3, 11)' <'{SHELL}'"]
        if subprocess.run(line, capture_output=True).returncode == 0:
            return name
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="all tests here are of a user without root")
def test_a_user_without_root_has_a_loopback_cluster() -> None:
    require(loopback.can_make())
    if (python := find_interpreter()) is None:
        pytest.skip("another user can run no Python 3.11 on this checkout")
    shell = [*NOBODY, python, str(SHELL)]
    tasks = ["srun", "-N2", "bash", "-c", "echo $(id -u) $SLURMD_NODENAME"]
    made = subprocess.run([*shell, "--loopback", *tasks], capture_output=True, text=True, cwd="/")
    assert sorted(made.stdout.splitlines()) == ["65534 n1", "65534 n2"], made.stderr
    refused = subprocess.run([*shell, *tasks], capture_output=True, text=True, cwd="/")
    assert refused.returncode == 1 and "needs root" in refused.stderr
