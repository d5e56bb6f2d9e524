"""``shoestring checkpoint``: what a run can go on from. Loads torch for ``verify`` alone.

shoestring checkpoint ls <run>                  a line for each: steps, tokens, bytes, layout
shoestring checkpoint show <run> [step=100]     its facts and its tensors
shoestring checkpoint verify <run> [step=100]   reads every byte of all, or of one, and compares the checksums
shoestring checkpoint prune <run> keep=1        removes all but the newest
shoestring checkpoint export <run> to=<folder>  launcher/checkpoint_export.py
shoestring checkpoint import <folder>           launcher/checkpoint_import.py
"""

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby

from launcher import cli, folder
from launcher.invocation import Invocation
from launcher.keys import nearest
from training.checkpoint import folders
from training.checkpoint.manifest import DamagedError, Manifest
from training.checkpoint.place import Place

SUMMARY = "list, show, verify or remove the checkpoints of a run"
ARGUMENTS = ("action", "run")


@dataclass(kw_only=True, slots=True)
class Config:
    """Which of them."""

    folder: str = "runs"  # where runs are looked for by their id
    step: int | None = None  # that the checkpoint was made after; null: show the newest, verify all
    keep: int | None = None  # prune: so many of the newest stay
    keep_every: int = 0  # prune: and those of every so many steps; 0: none
    keep_best: int = 0  # prune: and those of the so many best evaluations that there is a checkpoint of

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep < 1:
            raise ValueError(f"keep={self.keep} must be at least 1")
        for name in ("keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


def run(config: Config, invocation: Invocation) -> int:
    """Prints what was asked for. Exit code 1 if a checkpoint is not what was written."""
    action, name = invocation.arguments
    if action not in ACTIONS:
        known = (*ACTIONS, "export", "import")
        raise ValueError(f"{action} must be one of {', '.join(known)}{nearest(action, known)}")
    return ACTIONS[action](config, folder.find_checkpoints(folder.open(name, config.folder).path))


def _list(config: Config, root: Place) -> int:
    print(f"{'step':>10}{'tokens':>18}{'MB':>12}  layout")
    best = dict(_read_best(root))
    for step in folders.find(root):
        try:
            manifest = folders.read_manifest(folders.locate(root, step))
        except DamagedError as damage:
            print(f"{step:>10}  {damage}")
            continue
        size = manifest.count_bytes() / 1e6
        note = f", held-out loss {best[step]:.4f}" if step in best else ""
        print(f"{step:>10}{manifest.run['tokens']:>18,}{size:>12,.1f}  {_describe_layout(manifest)}{note}")
    for path in folders.find_damaged(root):
        print(f"{path.name}: set aside, for it could not be loaded")
    return 0


def _show(config: Config, root: Place) -> int:
    step = choose(config.step, root)[-1]
    manifest = folders.read_manifest(folders.locate(root, step))
    facts = {key: value for key, value in manifest.run.items() if key not in ("config", "layers", "stages", "topology")}
    print(folders.locate(root, step), _describe_layout(manifest), sep="\n")
    print("\n".join(f"{key:<12} {value}" for key, value in facts.items()))
    for kind, names in groupby(sorted(manifest.tensors), lambda name: name.partition("/")[0]):
        print(f"\n{kind}/")
        for name in names:
            stored = manifest.tensors[name]
            shape = " x ".join(map(str, stored.shape)) or "one value"
            print(f"  {name.partition('/')[2]:<52} {stored.dtype:<9} {shape:<20} in {len(stored.pieces)}")
    return 0


def _verify(config: Config, root: Place) -> int:
    from training.checkpoint.files import verify

    faults = 0
    for step in choose(config.step, root):
        place = folders.locate(root, step)
        try:
            manifest = folders.read_manifest(place)
            found = list(verify(place, manifest))
        except DamagedError as damage:
            found = [str(damage)]
        print("\n".join(found) if found else f"{place}: {manifest.count_bytes() / 1e6:,.1f} MB, all as written")
        faults += len(found)
    return int(faults > 0)


def _prune(config: Config, root: Place) -> int:
    if config.keep is None:
        raise ValueError("keep=null must say how many of the newest stay, for example keep=1")
    best = [step for step, _ in _read_best(root)][: config.keep_best]
    gone = folders.prune(root, config.keep, config.keep_every, best)
    print(f"removed {', '.join(map(str, gone)) or 'nothing'}; {', '.join(map(str, folders.find(root))) or 'none'} stay")
    return 0


def _read_best(root: Place) -> list[tuple[int, float]]:
    """The best evaluations that a checkpoint was made for, as the newest one has them: step and loss, lowest first."""
    for step in reversed(folders.find(root)):
        with suppress(DamagedError):
            manifest = folders.read_manifest(folders.locate(root, step))
            return [(int(step), float(loss)) for loss, step in manifest.run.get("best", ())]
    return []


def choose(step: int | None, root: Place) -> list[int]:
    """The steps of all checkpoints in ``root``, or ``step`` alone. ValueError where there is none."""
    steps = folders.find(root)
    if not steps:
        raise ValueError(f"{root} has no checkpoint")
    if step is not None and step not in steps:
        raise ValueError(f"step={step} must be one of {', '.join(map(str, steps))}")
    return steps if step is None else [step]


def _describe_layout(manifest: Manifest) -> str:
    degrees = " ".join(f"{axis}={degree}" for axis, degree in manifest.run["topology"].items() if degree > 1)
    parallel = manifest.run["config"]["parallel"]
    return f"{degrees or 'one rank'}, {parallel['engine']}, {manifest.run['config']['precision']}"


ACTIONS: dict[str, Callable[[Config, Place], int]] = {"ls": _list, "show": _show, "verify": _verify, "prune": _prune}


if __name__ == "__main__":
    sys.exit(cli.main(["checkpoint", *sys.argv[1:]]))
