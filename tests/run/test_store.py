"""Checkpoints in a store of objects: a real server on this machine that speaks S3, and the commands a user types.

    s3://kept/runs/<id>/00000004/manifest.json, 00000.safetensors ...

Endpoint and credentials come from the environment, as they do anywhere.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem
from test_killed import finish, kill, rows, start
from test_train import SMALL

from launcher.cli import main
from training.checkpoint import store
from training.checkpoint.folders import find, locate
from training.checkpoint.store import Remote, UnreachableError, at

FOLDER = "checkpoint.folder=s3://kept/runs"
RANKS = ("parallel.dp=2", "parallel.ep=2", "run.steps=16", "run.eval_every=8", "run.compile=off", "run.device=cpu")
ALONE = ("data.corpus=[text.txt]", *SMALL, "run.compile=off", "run.device=cpu", "run.sample.tokens=0", FOLDER)
ALONE = (*ALONE, "checkpoint.every=2", "checkpoint.minutes=null", "checkpoint.resume=auto")


def serve(folder: Path, port: int = 0) -> tuple["subprocess.Popen[bytes]", str]:
    """A server that has nothing yet, and its address."""
    with (folder / "server.log").open("wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 60
    while (found := re.search(r"Running on (http://[\d.:]+)", (folder / "server.log").read_text())) is None:
        assert server.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
        time.sleep(0.05)
    return server, found[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A text, and a server with the bucket ``kept`` as the environment's."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "text.txt").write_text("".join(f"line {i}: {i * i} foxes jump over {i % 7} dogs\n" for i in range(900)))
    server, address = serve(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "one",
            "AWS_SECRET_ACCESS_KEY": "two",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # of botocore, below s3fs's own five
        }.items():
            patch.setenv(name, value)
        at("s3://kept").system.mkdir("kept")
        yield folder
    server.kill()
    server.wait()


def test_an_object_of_several_parts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There when it is whole. One that was cut off never is, and nothing of it stays behind to be paid for."""
    monkeypatch.setattr(store, "PART", 5 * 2**20)  # as few as S3 takes
    root, content = at("s3://kept/parts"), os.urandom(2**20) * 12
    with (root / "whole").create() as file:
        assert file.write(content[:100]) + file.write(memoryview(content)[100:]) == len(content)
        assert not (root / "whole").exists() and len(root.system.list_multipart_uploads("kept")) == 1
    with pytest.raises(InterruptedError), (root / "half").create() as file:
        file.write(content)
        raise InterruptedError
    assert [path.name for path in root.iterdir()] == ["whole"] and root.system.list_multipart_uploads("kept") == []
    into = bytearray(len(content) + 9)
    with (root / "whole").open("rb") as file:
        assert file.readinto(into) == len(content) and into[:-9] == content
        file.seek(len(content) - 5)
        assert file.readinto(into) == 5 and file.seek(len(content)) == len(content) and file.readinto(into) == 0


def test_a_store_that_says_nothing_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes connections, and that is all."""
    monkeypatch.setattr(store, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        silent = store.Remote(S3FileSystem(endpoint_url=address), "kept/one")
        for ask in (silent.exists, lambda: silent.write_bytes(b"x"), lambda: list(silent.iterdir())):
            with pytest.raises(UnreachableError, match=r"s3://kept/one cannot .*: no answer within 0.5 s"):
                ask()


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """A run of two ranks of which one was killed, and that went on to its end."""
    run = folder / "runs" / "killed"
    process = start(folder, *RANKS, FOLDER, "run.id=killed", "run.restarts=1")
    kill(process, run, 9)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "finished after 16 of 16 steps" in said, said
    assert "rank 1 was ended by SIGKILL" in said
    assert re.search(r"starting again from the checkpoint after step (4|8|12) \(1 of 1\)", said), said
    return run


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on(folder: Path, killed: Path) -> None:
    finish(folder, *RANKS, "run.id=whole")
    assert rows(killed) == rows(folder / "runs" / "whole")
    found, expected = (folder / "runs" / name / "weights" / "00001.safetensors" for name in ("killed", "whole"))
    assert found.read_bytes() == expected.read_bytes()
    assert not (killed / "checkpoints").exists() and find(folder / "runs" / "whole" / "checkpoints") == [12, 16]
    # What is no longer kept has gone, to the last object.
    names = {f"{step:08}/{name}" for step in (12, 16) for name in ("00000.safetensors", "00001.safetensors")}
    assert list_names("killed") == names | {"00000012/manifest.json", "00000016/manifest.json"}


def list_names(run: str) -> set[str]:
    root = at(f"s3://kept/runs/{run}")
    return {path.removeprefix(f"{root.path}/") for path in root.system.find(root.path)}


def test_the_commands_see_what_is_there(
    folder: Path, killed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["checkpoint", "ls", "killed"]) == 0
    assert re.findall(r"^ +(\d+) ", capsys.readouterr().out, re.MULTILINE) == ["12", "16"]
    assert main(["checkpoint", "show", "killed", "step=12"]) == 0
    assert capsys.readouterr().out.startswith("s3://kept/runs/killed/00000012\ndp=2 ep=2, native, bf16\n")
    assert main(["checkpoint", "verify", "killed"]) == 0
    assert capsys.readouterr().out.count("all as written") == 2
    assert main(["checkpoint", "export", "killed", "to=last"]) == main(["export", "killed", "to=weights"]) == 0
    for path in Path("weights").iterdir():
        assert (Path("last") / path.name).read_bytes() == path.read_bytes()
    assert main(["checkpoint", "import", "weights", *ALONE[:-1], "run.id=imported"]) == 0
    assert "weights is in s3://kept/runs/imported/00000000" in capsys.readouterr().out
    for name, step in (("killed", 16), ("s3://kept/runs/killed/00000012", 12)):
        assert main(["eval", name, "device=cpu", "threads=1"]) == 0
        assert f"s3://kept/runs/killed/{step:08} after step {step}\n" in capsys.readouterr().out
    assert main(["checkpoint", "prune", "killed", "keep=1"]) == 0
    assert "removed 12; 16 stay" in capsys.readouterr().out
    assert {name[:8] for name in list_names("killed")} == {"00000016"}


@pytest.fixture
def root(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Remote]:
    """The checkpoints of a run called ``one``, after 2 and 4 steps of 8."""
    monkeypatch.chdir(folder)
    root = at("s3://kept/runs/one")
    assert main(["train", *ALONE, "run.id=one", "run.steps=4"]) == 0 and find(root) == [2, 4]
    capsys.readouterr()
    yield root
    root.remove()
    shutil.rmtree("runs/one")


def test_the_newest_good_one_is_taken(root: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside one that has a bit flipped, and one that was cut off."""
    content = bytearray((locate(root, 4) / "00000.safetensors").read_bytes())
    content[-9] ^= 1
    (locate(root, 4) / "00000.safetensors").write_bytes(bytes(content))
    (locate(root, 6) / "00000.safetensors").write_bytes(bytes(content))
    assert main(["checkpoint", "verify", "one"]) == 1
    assert "s3://kept/runs/one/00000004/00000.safetensors: " in capsys.readouterr().out
    assert main(["train", *ALONE, "run.id=one"]) == 0
    said = capsys.readouterr().out
    assert "s3://kept/runs/one/00000006 was never completed: removed" in said
    assert "after step 4 cannot be loaded and is now s3://kept/runs/one/00000004.damaged: rank 0: s3://kept/" in said
    assert "is damaged: its checksum is not the manifest's" in said and "goes on after step 2 and" in said
    assert find(root) == [6, 8] and (root / "00000004.damaged" / "manifest.json").exists()
    assert main(["checkpoint", "ls", "one"]) == 0
    assert "00000004.damaged: set aside" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["missing", "shorter"])
def test_so_it_is_beside_one_that_lacks_something(root: Remote, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = locate(root, 4) / "00000.safetensors"
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5000])
    assert main(["train", *ALONE, "run.id=one", "run.steps=5"]) == 0
    said = capsys.readouterr().out
    assert {"missing": "there is no such object", "shorter": "is cut short"}[what] in said
    assert "goes on after step 2 and" in said


def test_a_run_has_its_checkpoints_in_one_place(root: Remote, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("runs/one", "runs/copy")
    for words, rule in {
        ("run.id=one", "checkpoint.folder=null"): "checkpoint.folder=None must be s3://kept/runs, where run.id=one has",
        ("run.id=none", "checkpoint.folder=s3://lost/x"): "checkpoint.folder: s3://lost/x/none/tried cannot be read or",
        ("run.id=none", "checkpoint.folder=s3://a:b@kept/x"): "checkpoint.folder=s3://...@kept/x must have no",
        ("run.id=none", "checkpoint.folder=s4://kept/x"): "checkpoint.folder=s4://kept/x must be a folder, or a URL",
    }.items():
        assert main(["train", *ALONE, *words]) == 2
        assert rule in capsys.readouterr().err and not Path("runs/none").exists()
    shutil.rmtree("runs/one")
    assert main(["train", *ALONE, "run.id=one", "checkpoint.resume=never"]) == 2
    assert "run.id=one is taken: s3://kept/runs/one has its checkpoints" in capsys.readouterr().err
    assert main(["train", *ALONE, "run.id=one", "run.steps=5"]) == 0  # the machine that had its folder is gone
    assert "goes on after step 4 and" in capsys.readouterr().out
    shutil.rmtree("runs/copy")


@pytest.mark.timeout(600)
@pytest.mark.full
def test_a_server_that_dies_ends_no_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, address = serve(tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    command = "from training.checkpoint.store import at; at('s3://kept').system.mkdir('kept')"
    subprocess.run([sys.executable, "-c", command], check=True, timeout=240)
    shutil.copy(folder / "text.txt", tmp_path)
    words = [*RANKS, FOLDER, "checkpoint.every=8", "run.id=bereft", "checkpoint.resume=auto", "run.restarts=0"]
    process = start(tmp_path, *words)
    deadline = time.monotonic() + 90
    while not any(row["step"] >= 5 for row in rows(tmp_path / "runs" / "bereft")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "finished after 16 of 16 steps" in said, said
    reasons = re.findall(r"no checkpoint after step (\d+): rank 0: (.*)\. The run goes on", said)
    assert [step for step, _ in reasons][-1] == "16" and all("Could not connect" in reason for _, reason in reasons)
    # Nor is it begun again, when it cannot be told what there is.
    said = finish(tmp_path, *words, "run.steps=18", code=2)
    assert "shoestring: checkpoint.folder: s3://kept/runs/bereft" in said and "Could not connect" in said
    assert len([row for row in rows(tmp_path / "runs" / "bereft") if "lr" in row]) == 16
