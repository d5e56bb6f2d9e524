"""Near copies on the disk or in the memory of a node: what they are called, which there are, which can be used.

    /dev/shm/shoestring-mine-1f0c9a7be2d4/       of the run in one folder; nobody else may look inside, or have made it
        8a31c05e77f0/                            of one layout: a run that is started with another finds none
            00000007/00002.safetensors           all that rank 2 would load after 7 steps, written by itself
            00000007/00002.json                  its manifest, renamed into place last: the copy is there
            00000007/00000.json, ...             what this node keeps for a rank of another one

A copy is a checkpoint of one rank, in the same format (docs/checkpoint-format.md).
"""

import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from configs.schema import TrainConfig
from parallel.topology import Topology
from training.checkpoint.facts import check_facts
from training.checkpoint.files import name_file
from training.checkpoint.manifest import DamagedError, Manifest, parse


class Has(NamedTuple):
    """A rank that can read a copy where it is."""

    holder: int
    step: int
    owner: int  # whose state it is


class Choice(NamedTuple):
    """Copies of all ranks after the same step."""

    step: int
    holders: list[int]  # by owner: itself wherever it can, else the lowest rank that can


def name_run(config: TrainConfig, run: Path) -> Path:
    """Where a node keeps the copies of the run whose folder is ``run``."""
    where = str(run.absolute())
    return Path(config.checkpoint.near_folder) / f"shoestring-{run.name}-{_digest(where)}"


def name_layout(config: TrainConfig, topology: Topology) -> str:
    """The same for runs whose ranks load the same from a copy."""
    return _digest([asdict(topology), asdict(config.parallel), asdict(config.model), config.precision])


def locate(root: Path, step: int) -> Path:
    """The folder of the copies after so many steps; ``root`` is that of the layout."""
    return root / f"{step:08}"


def name_manifest(owner: int) -> str:
    """What the manifest of a rank's copy is called."""
    return f"{owner:05}.json"


def find(root: Path) -> list[tuple[int, int]]:
    """Step and owner of every copy of a layout that is there, the newest first."""
    found = (
        (int(path.parent.name), int(path.stem))
        for path in root.glob("*/*.json")
        if re.fullmatch(r"\d{8,}/\d{5,}\.json", f"{path.parent.name}/{path.name}", re.ASCII)
    )
    return sorted(((s, o) for s, o in found if (locate(root, s) / name_file(o)).exists()), reverse=True)


def find_newest(run: Path) -> int:
    """The step of the newest copies of a run on this node, of whatever layout; 0 if there are none."""
    return max((step for layout in run.glob("*") for step, _ in find(layout)), default=0)


def choose(have: Iterable[Has], world: int) -> Choice | None:
    """The newest step of which each of ``world`` ranks has a copy somewhere."""
    holders: dict[int, dict[int, int]] = {}
    for holder, step, owner in sorted(have, reverse=True):
        known = holders.setdefault(step, {})
        if known.get(owner) != owner:
            known[owner] = holder
    for step, by_owner in sorted(holders.items(), reverse=True):
        if set(range(world)) <= by_owner.keys():
            return Choice(step, [by_owner[owner] for owner in range(world)])
    return None


def read_manifest(folder: Path, owner: int) -> Manifest:
    """Of a copy. Raises DamagedError where there is none, or something else."""
    path = folder / name_manifest(owner)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error
    manifest = parse(text, str(path))
    check_facts(manifest, str(path))
    return manifest


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
