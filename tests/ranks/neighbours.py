"""What near copies promise of their messages: see promises.py. Two ranks, each on a node of its own."""

import os
import shutil
from pathlib import Path
from typing import Any

from breaks import Break
from sites import Site

from training.checkpoint import nearest
from training.checkpoint.neighbour import Neighbour
from training.checkpoint.state import Progress
from training.health.fingerprint import Fingerprints
from training.metrics import Record


def serve_the_lost(stand: Any) -> bool:
    """A rank whose node has lost its copy has it from the other node."""
    copies = make_copies(stand, 2, [])
    if stand.setup.mesh.rank == 1:
        shutil.rmtree(copies)
    found = nearest.resume(stand.setup, stand.folder, lambda line: None)
    return found is not None and found[0].step == 2


def go_back_near(stand: Any) -> bool:
    """Where one rank finds its copy damaged, and there is no other, all take the one before."""
    copies, rank = make_copies(stand, 2, []), stand.setup.mesh.rank
    next(copies.glob(f"*/*/00000002/{1 - rank:05}.json")).unlink()
    if rank == 1:
        os.truncate(next(copies.glob("*/*/00000002/00001.safetensors")), 2000)
    found = nearest.resume(stand.setup, stand.folder, lambda line: None)
    return found is not None and found[0].step == 1


def give_up_near(stand: Any) -> bool:
    """Where one rank cannot write, there is no copy, and all know why."""
    notes: list[str] = []
    if stand.setup.mesh.rank == 1:
        (stand.folder / "node1").write_text("no folder")
    try:
        make_copies(stand, 1, notes)
    except OSError:
        return False
    return "no near copy after step 1: " in "".join(notes) and "rank 1: " in "".join(notes)


def make_copies(stand: Any, steps: int, notes: list[str]) -> Path:
    """After each of the first steps; the folder of this rank's node."""
    mesh, how = stand.setup.mesh, stand.setup.config.checkpoint
    mesh.ranks_per_node = 1
    copies: Path = stand.folder / f"node{mesh.rank}"
    how.near_every, how.near_folder = 1, str(copies)
    with Record(stand.folder / ("metrics.jsonl" if mesh.rank == 0 else "others.jsonl")) as record:
        neighbour = Neighbour(stand.setup, stand.folder, record, notes.append, 0, Fingerprints(stand.setup, 0).expect)
        for step in range(steps):
            record.write("step", step=step)
            neighbour.save(Progress(step=step + 1))
        neighbour.close(needed=True)
    return copies


NEAR = {"serve": serve_the_lost, "go back near": go_back_near, "give up near": give_up_near}
POST, NEAREST = "training/checkpoint/post.py", "training/checkpoint/nearest.py"
SIZES, BLOCKS = (Site(POST, "send", "dist.send", index) for index in range(2))
HEARD, ARRIVING = Site(POST, "receive", "dist.recv"), Site(POST, "_arrive", "dist.recv")
NEAR_PROMISED = [
    *(Break(site, "sent wrong", how="serve") for site in (SIZES, BLOCKS)),
    Break(HEARD, "received wrong", how="serve"),
    Break(ARRIVING, "received nothing", how="serve"),
    Break(Site(NEAREST, "_find", "sum_over"), "unheard", how="serve"),
    Break(Site(NEAREST, "resume", "tell"), "unheard", how="go back near"),
    Break(Site("training/checkpoint/neighbour.py", "Neighbour._settle", "tell"), "unheard", how="give up near"),
]
