"""Goes on from near copies: from the newest step of which the copies of all ranks are somewhere.

find      each rank tells which copies are in its node's folder         parallel ranks of a node see the same ones
choose    the newest step first, among those behind the newest checkpoint that the record has come to as well
fetch     a rank whose node has not got its copy has it sent by one that has
read      every checksum, as from any checkpoint; where one rank cannot, all take their other copies of that step, and
          where there are none, the step before
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from training.agree import sum_over, tell
from training.checkpoint import folders, near
from training.checkpoint.manifest import DamagedError
from training.checkpoint.neighbour import KEPT
from training.checkpoint.post import receive, send
from training.checkpoint.state import Progress, accept, read
from training.setup import Setup


def resume(setup: Setup, folder: Path, note: Callable[[str], None]) -> tuple[Progress, int] | None:
    """Puts the state of the newest near copies of the run in ``folder`` into ``setup``. Collective.

    Returns how far the run has come, in steps and in tokens; None where there are no copies that are newer than its
    newest checkpoint and can be used: then it is to be loaded, and puts all right that was read before. Raises
    ValueError for copies of another model.
    """
    mesh = setup.mesh
    run, layout = near.name_run(setup.config, folder), near.name_layout(setup.config, mesh.topology)
    have = _find(setup, folder, run / layout)
    while choice := near.choose(have, mesh.topology.world):
        place, error = near.locate(run / layout, choice.step), ""
        try:
            _fetch(setup, place, choice)
            manifest = near.read_manifest(place, mesh.rank)
            read(setup, place, manifest)
        except (DamagedError, OSError) as damage:
            error = f"rank {mesh.rank}: {damage}"
        if not (reasons := tell(mesh, error)):
            away = sum(holder != owner for owner, holder in enumerate(choice.holders))
            note(f"near copies after step {choice.step} are taken" + (f", {away} from another node" if away else ""))
            return replace(accept(setup, manifest), near=True), int(manifest.run["tokens"])
        note(f"a near copy after step {choice.step} cannot be loaded: {'; '.join(reasons)}")
        have = list(_leave_out(have, choice, mesh.ranks_per_node))
    return None


def sweep(setup: Setup, folder: Path, step: int) -> None:
    """Removes the near copies of the run in ``folder`` that are not of ``step``, which it goes on after."""
    run = near.name_run(setup.config, folder)
    clear(run, near.locate(run / near.name_layout(setup.config, setup.mesh.topology), step))


def clear(run: Path, kept: Path) -> None:
    """Removes all copies of a ``run`` but those in the folder ``kept``: others are of steps that come anew."""
    if not folders.is_own(run):  # or else, by a link, whatever somebody likes is removed
        return
    for path in (*run.glob("*/*"), *run.glob("*")):
        if path not in (kept, kept.parent):
            folders.discard(path)


def _find(setup: Setup, folder: Path, root: Path) -> list[near.Has]:
    """What can be tried. All ranks hear what each of them has, newest first, as many as a node may have to keep."""
    if not setup.config.checkpoint.near_every:
        return []
    mesh = setup.mesh
    mesh.aside()  # made by all ranks together, whoever uses it
    room = (KEPT + 1) * 2 * mesh.ranks_per_node
    table = torch.zeros(mesh.topology.world, 1 + room, 2, dtype=torch.int64)
    if mesh.rank == 0:
        saved = folders.find(folders.find_root(setup.config.checkpoint.folder, folder))
        table[0, 0] = torch.tensor([saved[-1] if saved else 0, _count_recorded(folder / "metrics.jsonl")])
    found = near.find(root) if folders.is_own(root.parent) else []
    for place, (step, owner) in enumerate(found[:room], start=1):
        table[mesh.rank, place] = torch.tensor([step, owner])
    heard = sum_over(table.to(mesh.device), mesh).tolist()
    saved, recorded = heard[0][0]
    have = [near.Has(rank, step, owner) for rank, row in enumerate(heard) for step, owner in row[1:] if step]
    return [has for has in have if saved < has.step <= recorded]


def _leave_out(have: list[near.Has], choice: near.Choice, each: int) -> Iterator[near.Has]:
    """``have`` without what was chosen; ``each`` node has so many ranks, which see the same."""
    chosen = {(holder // each, owner) for owner, holder in enumerate(choice.holders)}
    return (has for has in have if has.step != choice.step or (has.holder // each, has.owner) not in chosen)


def _fetch(setup: Setup, place: Path, choice: near.Choice) -> None:
    """In the order of owners on all ranks, so that nobody waits in a circle. Raises OSError as ``send`` and
    ``receive``, once this rank has sent what others wait for.
    """
    mesh, failures = setup.mesh, list[OSError]()
    for owner, holder in enumerate(choice.holders):
        if holder == owner or mesh.rank not in (holder, owner):
            continue
        try:
            if mesh.rank == holder:
                send(place, owner, owner, mesh.aside())
            else:
                receive(place, owner, holder, mesh.aside())
        except OSError as error:
            failures.append(error)
    for failure in failures:
        raise failure


def _count_recorded(path: Path) -> int:
    """Steps in the record: a run goes on behind none that is missing from it. A line that was cut off is none."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = (json.loads(line) for line in lines if line.endswith("\n"))
    return max((row["step"] + 1 for row in rows if row["kind"] == "step"), default=0)
