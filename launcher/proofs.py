"""Proofs that passed, kept by the class of layout that they are of: one JSON file each, named by the hash of the class.

    class     the small cases that stand for a configuration (training/proof/shrink.py), the sources of everything that
              computes, and the versions of the libraries that do
    folder    ``proofs``, else $XDG_CACHE_HOME/shoestring/proofs, else ~/.cache/shoestring/proofs

Sizes, learning rates and batches do not change a class; another degree, engine or router, a line of code or another
torch does, and is proved anew. A file appears whole or not at all. One that cannot be read, or that says anything but
that the whole proof passed, is no proof.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.proof.report import Row
from training.support import DEEPSPEED

if TYPE_CHECKING:
    from training.proof.case import Case

ROOT = Path(__file__).parents[1]
ROOMS = ("model", "parallel", "training")

Rows = tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class Proof:
    """A proof that passed."""

    hash: str
    date: str  # ISO 8601, UTC
    topology: dict[str, int]  # that was proved
    engine: str
    versions: dict[str, str]
    unproved: tuple[str, ...]  # of the configuration it was made for, in words
    cases: dict[str, Rows]

    @property
    def brief(self) -> str:
        """Which one it is, in a few words."""
        return f"proof {self.hash[:12]} of {self.date[:16].replace('T', ' ')}"


def locate(folder: str | None) -> Path:
    """Where proofs are kept. ValueError where ``folder`` is None and the user has no home."""
    if folder is not None:
        return Path(folder)
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:
            raise ValueError(
                "proofs=null must be a folder here, where the user has no home: write proofs=..."
            ) from None
    return cache / "shoestring" / "proofs"


def identify(cases: "Mapping[str, Case]", root: Path = ROOT) -> str:
    """The hash of the class that ``cases`` are of, with the sources under ``root``."""
    paths = sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))
    facts = {
        "cases": {name: asdict(case) for name, case in cases.items()},
        "schedules": sorted(
            {hash_bytes(Path(case.pipeline.file).read_bytes()) for case in cases.values() if case.pipeline.file}
        ),
        "versions": list_versions(cases),
        "sources": {path.relative_to(root).as_posix(): hash_bytes(path.read_bytes()) for path in paths},
    }
    return hash_bytes(json.dumps(facts, sort_keys=True).encode())


def hash_bytes(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def list_versions(cases: "Mapping[str, Case]") -> dict[str, str]:
    """Of the libraries that the cases compute with."""
    deepspeed = any(case.engine in DEEPSPEED for case in cases.values())
    return {name: version(name) for name in ("torch", "deepspeed") if name == "torch" or deepspeed}


def describe(key: str, cases: "Mapping[str, Case]", rows: Mapping[str, Rows], unproved: list[str]) -> Proof:
    """What is kept of a proof that has just passed; ``key`` is the hash of its class."""
    case = next(iter(cases.values()))
    date = datetime.now(UTC).isoformat(timespec="seconds")
    topology, versions = asdict(case.topology), list_versions(cases)
    return Proof(key, date, topology, str(case.engine), versions, tuple(unproved), dict(rows))


def find(folder: Path, key: str) -> Proof | None:
    """The proof of the class with the hash ``key``, if one is kept and sound."""
    try:
        proof = _read(json.loads((folder / f"{key}.json").read_text()))
        passed = [bool(rows) and all(row.passed for row in rows) for rows in proof.cases.values()]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return proof if proof.hash == key and passed and all(passed) else None


def _read(tree: dict[str, Any]) -> Proof:
    cases = {name: tuple(Row(**row) for row in rows) for name, rows in tree["cases"].items()}
    return Proof(**{**tree, "cases": cases, "unproved": tuple(tree["unproved"])})


def write(proof: Proof) -> dict[str, Any]:
    """A proof as JSON has it."""
    return asdict(proof) | {"cases": {name: [row._asdict() for row in rows] for name, rows in proof.cases.items()}}


def keep(folder: Path, proof: Proof) -> str:
    """Keeps a proof; says where, or why it could not be kept."""
    path = folder / f"{proof.hash}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".new", delete=False) as new:
            new.write(json.dumps(write(proof), indent=1) + "\n")
        Path(new.name).chmod(0o644)  # others may read it
        Path(new.name).replace(path)
    except OSError as error:
        return f"not recorded: {error}"
    return f"recorded as {proof.hash[:12]} in {folder}"


def forget(folder: Path, key: str) -> None:
    """The class with the hash ``key`` is proved no longer."""
    (folder / f"{key}.json").unlink(missing_ok=True)
