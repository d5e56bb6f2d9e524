"""What a checkpoint costs: saving and loading beside dd of the same bytes, and beside torch.distributed.checkpoint.

    python benchmarks/checkpoint.py [--rounds 5] [--folder DIR]

Four ranks of this machine, one thread each, with the masters and moments of 0.18 B parameters, 2.1 GB. In every round,
in turns: a checkpoint (staged, hashed, written, synchronised, committed), four dd with fsync at once and one alone,
torch.distributed.checkpoint's default writer; then, each from files that have left the cache, a load in the same
layout, one that compares a block in eight, one in another layout, four dd to /dev/null. Those that read take turns at
being the first, who fills memory that a virtual machine may have to ask for. At last the checksums alone, of bytes in
memory: a bound of every load that compares all. Medians of the slowest rank.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as multiprocessing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launcher.compose import Composer  # noqa: E402
from parallel.mesh import Mesh, connect, disconnect  # noqa: E402
from training.checkpoint import folders  # noqa: E402
from training.checkpoint.keeper import Keeper  # noqa: E402
from training.checkpoint.manifest import BLOCK, Manifest  # noqa: E402
from training.checkpoint.state import Progress, collect, read  # noqa: E402
from training.config import Check  # noqa: E402
from training.machine import arrange_world  # noqa: E402
from training.metrics import Record  # noqa: E402
from training.setup import Setup, set_up  # noqa: E402

RANKS = 4
MODEL = ("run=small", "model.hidden=768", "model.num_layers=8", "model.moe.ffn=640", "run.compile=off", "run.threads=1")
HERE = ("parallel.dp=4", "parallel.ep=2")
THERE = ("parallel.pp=2", "parallel.dp=2", "parallel.ep=2", "run.micro_batch=4")
DD = ("dd", "bs=16M", "status=none")


def work(rank: int, folder: Path, rounds: int) -> None:
    """A rank's process; rank 0 prints."""
    connect(torch.device("cpu"), rank, RANKS, folder / "store")
    here, there = (prepare(folder, words) for words in (HERE, THERE))
    for chunk in (*here.engine.held(), *there.engine.held()):
        chunk.tensor.normal_()
    trial = Trial(rank, folder, here, there)
    seconds: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name, taken in trial.take(number + 1).items():
            slowest = torch.tensor(taken, dtype=torch.float64)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            seconds.setdefault(name, []).append(slowest.item())
    if rank == 0:
        report({name: median(each[1:]) for name, each in seconds.items()}, trial.size)  # the first round warms up
    disconnect()


def prepare(folder: Path, words: tuple[str, ...]) -> Setup:
    """A run that could begin, in a layout."""
    text = (f"data.corpus=[{ROOT / 'training'}]", f"data.folder={folder / 'data'}")
    config = Composer().compose((*MODEL, *words, *text))[0]
    return set_up(config, lambda line: None, Mesh(arrange_world(config, RANKS), torch.device("cpu")))


class Trial:
    """One rank's part of every contender."""

    def __init__(self, rank: int, folder: Path, here: Setup, there: Setup) -> None:
        self._rank, self._folder, self._here, self._there = rank, folder, here, there
        self._record, self.size = Record(Path(os.devnull)), 0
        here.config.checkpoint.keep = 1
        self._keeper = Keeper(here, folder, self._record, lambda line: None, 0, lambda step: lambda copies: None)

    def take(self, number: int) -> dict[str, float]:
        """Seconds of all of them, once."""
        found = {"stall": self._time(lambda: self._keeper.save(Progress(step=number)))}
        found["copied"] = found["stall"] + self._time(self._keeper.hold)
        found["save"] = found["copied"] + self._time(self._keeper.settle)
        place = folders.locate(self._folder / folders.FOLDER, number)
        self.size = sum(path.stat().st_size for path in place.glob("*.safetensors"))
        own = place / f"{self._rank:05}.safetensors"
        self._read(own)  # what dd copies is in the cache, of which a checkpoint that is written leaves nothing
        found |= {"dd": self._time(lambda: self._copy(own)), "one dd": self._time(lambda: self._copy_all(place))}
        found["dcp"] = self._time(self._save_by_torch)
        shutil.rmtree(self._folder / "dcp", ignore_errors=True)
        manifest = folders.read_manifest(place)
        loads: dict[str, Callable[[], object]] = {
            "load": lambda: self._load(self._here, Check.full, place, manifest),
            "load elsewhere": lambda: self._load(self._there, Check.full, place, manifest),
            "load sampled": lambda: self._load(self._here, Check.sampled, place, manifest),
            "dd from": lambda: self._read(own),
        }
        names = list(loads)
        for turn in range(len(names)):
            name = names[(number + turn) % len(names)]
            forget(own)
            found[name] = self._time(loads[name])
        content = memoryview(own.read_bytes())
        blocks = [content[at : at + BLOCK] for at in range(0, len(content), BLOCK)]
        return found | {"checksums": self._time(lambda: [sha256(block) for block in blocks])}

    def _load(self, setup: Setup, check: Check, place: Path, manifest: Manifest) -> None:
        setup.config.checkpoint.check = check
        read(setup, place, manifest)

    def _time(self, action: Callable[[], object]) -> float:
        dist.barrier()
        started = perf_counter()
        action()
        return perf_counter() - started

    def _read(self, path: Path) -> None:
        subprocess.run([*DD, f"if={path}", "of=/dev/null"], check=True)

    def _copy(self, path: Path) -> None:
        target = self._folder / f"dd-{self._rank}"
        subprocess.run([*DD, f"if={path}", f"of={target}", "conv=fsync"], check=True)
        target.unlink()

    def _copy_all(self, place: Path) -> None:
        if self._rank == 0:
            target = self._folder / "dd"
            with subprocess.Popen(["cat", *sorted(place.glob("*.safetensors"))], stdout=subprocess.PIPE) as files:
                subprocess.run([*DD, "iflag=fullblock", f"of={target}", "conv=fsync"], stdin=files.stdout, check=True)
            target.unlink()

    def _save_by_torch(self) -> None:
        state = {f"{chunk.name}@{chunk.offset}@{self._rank}": chunk.tensor for chunk in collect(self._here)}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(self._folder / "dcp"))


def forget(path: Path) -> None:
    """``path`` leaves the cache of this machine."""
    dist.barrier()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(seconds: dict[str, float], size: int) -> None:
    """The figures that are wanted, and the times they are made of."""
    for name, each in seconds.items():
        print(f"{name:<16}{each:8.2f} s{size / each / 1e6:12,.0f} MB/s")
    ratios = {
        "save, of four dd with fsync": (seconds["dd"] / seconds["save"], "wanted: at least 0.85"),
        "save, of one dd with fsync": (seconds["one dd"] / seconds["save"], "wanted: at least 0.85"),
        "load, of four dd": (seconds["dd from"] / seconds["load"], "wanted: at least 0.85"),
        "load sampled, of four dd": (seconds["dd from"] / seconds["load sampled"], "what checking costs"),
        "load, of its checksums alone": (seconds["checksums"] / seconds["load"], "at most 1, its bound"),
        "save, of torch.distributed.checkpoint": (seconds["dcp"] / seconds["save"], "wanted: above 1"),
        "stall, of the whole save": (seconds["stall"] / seconds["save"], "wanted: at most 0.05"),
        "stall, did an update come at once": (
            seconds["copied"] / seconds["save"],
            "not beside a step, as it is in a run",
        ),
        "load in another layout, of the same": (seconds["load elsewhere"] / seconds["load"], "wanted: at most 1.3"),
    }
    print(f"\n{size / 1e9:.2f} GB")
    for name, (ratio, wanted) in ratios.items():
        print(f"{name:<40}{ratio:7.3f}  {wanted}")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", help="on the file system that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        multiprocessing.start_processes(work, (Path(name), options.rounds), RANKS, start_method="spawn")


if __name__ == "__main__":
    main()
