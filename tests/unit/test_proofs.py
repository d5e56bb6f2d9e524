"""Proofs that are kept: what a class of layout is, and files that say anything but that all of it passed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_models import make_config

from launcher import proofs
from model.config import Recompute
from parallel.config import EngineName
from parallel.topology import Topology
from training.config import OptimizerConfig
from training.proof.case import Case
from training.proof.report import Row

CASE = Case(Topology(dp=2, ep=2), make_config(), OptimizerConfig(lr=1e-3))
ROWS = (Row("loss", 1e-15, 1e-12, "step 0", 2), Row("routing", 0.0, 0.0, "router 0", 2))
CHANGES: dict[str, Callable[[Case], Case]] = {
    "degree": lambda case: replace(case, topology=Topology(dp=2)),
    "engine": lambda case: replace(case, engine=EngineName.fsdp2),
    "deepest value": lambda case: replace(
        case, model=replace(case.model, moe=replace(case.model.moe, top_k=case.model.moe.top_k + 1))
    ),
    "recompute": lambda case: replace(case, model=replace(case.model, recompute=Recompute.full)),
    "batch": lambda case: replace(case, micro_batch=2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_case_is_another_class(change: str) -> None:
    assert proofs.identify({"spread": CASE}) == proofs.identify({"spread": replace(CASE)})
    assert proofs.identify({"spread": CASE}) != proofs.identify({"spread": CHANGES[change](CASE)})
    assert proofs.identify({"spread": CASE}) != proofs.identify({"spread": CASE, "crowded": CASE})


@pytest.mark.parametrize("room", proofs.ROOMS)
def test_another_line_of_code_is_another_class(room: str, tmp_path: Path) -> None:
    for name in (*proofs.ROOMS, "launcher"):
        shutil.copytree(proofs.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    before = proofs.identify({"spread": CASE}, tmp_path)
    with (tmp_path / "launcher" / "train.py").open("a") as file:
        file.write("# computes nothing\n")
    assert proofs.identify({"spread": CASE}, tmp_path) == before
    last = sorted((tmp_path / room).rglob("*.py"))[-1]
    with last.open("a") as file:
        file.write("x = 1\n")
    changed = proofs.identify({"spread": CASE}, tmp_path)
    assert changed != before
    last.rename(last.with_name("renamed.py"))
    assert proofs.identify({"spread": CASE}, tmp_path) not in (changed, before)


def test_another_version_is_another_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's counts for its engines alone."""
    native, zero = {"spread": CASE}, {"spread": replace(CASE, engine=EngineName.zero1)}
    before = [proofs.identify(native), proofs.identify(zero)]
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "deepspeed")
    between = [proofs.identify(native), proofs.identify(zero)]
    assert between[0] == before[0] and between[1] != before[1]
    install(tmp_path, "torch")
    assert proofs.identify(native) != before[0] and proofs.identify(zero) != between[1]


def install(folder: Path, name: str) -> None:
    """Metadata of a package, found before that which is installed."""
    (folder / f"{name}-99.dist-info").mkdir()
    (folder / f"{name}-99.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 99\n")


def make_proof() -> proofs.Proof:
    return proofs.describe("ab" * 32, {"spread": CASE}, {"spread": ROWS}, ["parallel.dp=64: proved with 2"])


def test_what_is_kept_is_found(tmp_path: Path) -> None:
    proof, folder = make_proof(), tmp_path / "not" / "there"
    assert proofs.find(folder, proof.hash) is None
    assert proofs.keep(folder, proof) == f"recorded as {proof.hash[:12]} in {folder}"
    assert proofs.find(folder, proof.hash) == proof
    assert [path.name for path in folder.iterdir()] == [f"{proof.hash}.json"], "nothing half written stays"
    kept = json.loads((folder / f"{proof.hash}.json").read_text())
    assert kept["unproved"] == ["parallel.dp=64: proved with 2"] and kept["topology"]["ep"] == 2
    proofs.forget(folder, proof.hash)
    proofs.forget(folder, proof.hash)
    assert proofs.find(folder, proof.hash) is None


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another hash": lambda tree: tree | {"hash": "0" * 64},
    "nothing proved": lambda tree: tree | {"cases": {}},
    "a case without rows": lambda tree: tree | {"cases": {**tree["cases"], "crowded": []}},
    "a row that failed": lambda tree: tree | {"cases": {"spread": [ROWS[0]._replace(worst=1.0)._asdict()]}},
    "a row that is no number": lambda tree: (
        tree | {"cases": {"spread": [ROWS[0]._replace(worst=float("nan"))._asdict()]}}
    ),
    "a row that is text": lambda tree: tree | {"cases": {"spread": [ROWS[0]._asdict() | {"worst": "0"}]}},
    "a row of another kind": lambda tree: tree | {"cases": {"spread": [{"what": "loss"}]}},
    "rows that are text": lambda tree: tree | {"cases": {"spread": "passed"}},
    "cases that are a list": lambda tree: tree | {"cases": [1]},
    "a key that is missing": lambda tree: {key: value for key, value in tree.items() if key != "date"},
    "a key too many": lambda tree: tree | {"more": 1},
    "a list": lambda tree: [tree],
    "a number": lambda tree: 3,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_no_proof(damage: str, tmp_path: Path) -> None:
    proof = make_proof()
    proofs.keep(tmp_path, proof)
    path = tmp_path / f"{proof.hash}.json"
    path.write_text(json.dumps(DAMAGES[damage](json.loads(path.read_text()))))
    assert proofs.find(tmp_path, proof.hash) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{"])
def test_a_file_that_is_no_json_is_no_proof(content: bytes, tmp_path: Path) -> None:
    proof = make_proof()
    proofs.keep(tmp_path, proof)
    path = tmp_path / f"{proof.hash}.json"
    whole = path.read_bytes()
    path.write_bytes(content)
    assert proofs.find(tmp_path, proof.hash) is None
    path.write_bytes(whole[: len(whole) // 2])
    assert proofs.find(tmp_path, proof.hash) is None
    path.write_bytes(whole)
    assert proofs.find(tmp_path, proof.hash) == proof


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = proofs.keep(tmp_path / "file" / "proofs", make_proof())
    assert said.startswith("not recorded: ") and "file" in said


def test_where_proofs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert proofs.locate("shared") == Path("shared")
    assert proofs.locate(None) == tmp_path / "cache" / "shoestring" / "proofs"
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert proofs.locate(None) == tmp_path / ".cache" / "shoestring" / "proofs"
