"""A checkpoint of DeepSeek-V3, 671 B parameters and MTP, over files that have no bytes; and its export, measured.

    python tests/unit/full_size.py        writes the stand-in to a temporary folder, exports a part, prints what it took

Every tensor has its full shape and lies in pieces as 64 expert-parallel ranks of a pipeline would have written it: 8 TB
of zeros that the file system keeps no block of, under digests of zeros. All 46 183 published tensors are planned. Of
these the largest and some of every kind are read, checked, rounded, and written to files that are emptied as they grow.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

from torch import Tensor

from launcher.compose import Composer
from model.build import outline
from model.config import ModelConfig
from model.huggingface import publish
from model.huggingface_fp8 import quantise_pending
from model.shards import Pending, write_shards
from training.checkpoint import folders
from training.checkpoint.facts import check_model
from training.checkpoint.manifest import BLOCK, MANIFEST, SIZES, Manifest, Piece, Stored, write
from training.checkpoint.weights import open_weights
from training.config import Precision
from training.determinism import NUMERICS
from training.gather import name_tensors

RANKS = 64
TAKEN = (  # published names begin so
    "model.embed_tokens.",
    "model.layers.0.",
    "model.layers.3.self_attn.",
    "model.layers.3.mlp.gate.",
    *(f"model.layers.3.mlp.experts.{expert}." for expert in (0, 1, 255)),
    "model.layers.61.eh_proj.",
)


def load_model() -> ModelConfig:
    return Composer().compose(("run=deepseek_v3",))[0].model


def save_stand_in(folder: Path, model: ModelConfig) -> None:
    """A checkpoint in ``folder``, which exists."""
    ends = dict.fromkeys((f"{rank:05}.safetensors" for rank in range(RANKS)), 4096)
    plain = outline(model, NUMERICS[Precision.bf16].dtype)
    buffers = {name for name, _ in plain.named_buffers()}
    tensors: dict[str, Stored] = {}
    for name, tensor in name_tensors([plain]).items():
        for kind in ("buffer",) if name in buffers else ("master", "m", "v"):
            tensors[f"{kind}/{name}"] = Stored(tuple(tensor.shape), "float32", tuple(_cut(tuple(tensor.shape), ends)))
    (folder / MANIFEST).write_text(write(Manifest(tensors, _describe(model))))
    for file, size in ends.items():
        (folder / file).touch()
        os.truncate(folder / file, size)


def _cut(shape: tuple[int, ...], ends: dict[str, int]) -> Iterator[Piece]:
    """Experts in two pieces each, other matrices in runs of rows, one for each rank; ``ends`` of files move on."""
    files, experts = list(ends), len(shape) > 2 and shape[0] > 2
    step = 1 if experts else -(-shape[0] // RANKS)
    for number, row in enumerate(range(0, shape[0], step)):
        file = files[number * RANKS * step // shape[0] % RANKS]
        halves = (range(0, shape[1] // 2), range(shape[1] // 2, shape[1])) if experts else (None,)
        for half in halves:
            rows = min(step, shape[0] - row)
            offset = (row, *((half.start, *(0 for _ in shape[2:])) if half else (0 for _ in shape[1:])))
            extent = (rows, *((len(half), *shape[2:]) if half else shape[1:]))
            size = SIZES["float32"]
            for length in extent:
                size *= length
            blocks = [BLOCK] * (size // BLOCK) + ([size % BLOCK] if size % BLOCK else [])
            yield Piece(offset, extent, file, ends[file], tuple(map(_hash_zeros, blocks)))
            ends[file] += size


@cache
def _hash_zeros(size: int) -> str:
    return hashlib.sha256(bytes(size)).hexdigest()


def _describe(model: ModelConfig) -> dict[str, Any]:
    counts = dict.fromkeys(("step", "tokens", "updates"), 1000) | dict.fromkeys(("since_move", "skipped"), 0)
    topology = {"pp": 16, "dp": 128, "cp": 1, "tp": 1, "ep": 64}
    config = {"model": asdict(model), "precision": "bf16", "parallel": {"engine": "native"}}
    return {**counts, "seconds": 1.0, "topology": topology, "config": config}


def export_part(folder: Path, to: Path, fp8: bool) -> dict[str, float]:
    """Exports ``TAKEN`` of the checkpoint in ``folder`` to ``to``, which exists: what it took, in bytes and seconds."""
    started, model, before = monotonic(), load_model(), measure("VmRSS")
    manifest = folders.read_manifest(folder)
    check_model(manifest, asdict(model), str(folder), "")
    tensors = publish(open_weights(folder, manifest, model), model)
    tensors = quantise_pending(tensors) if fp8 else tensors
    planned, seconds = measure("VmHWM"), monotonic() - started
    rest = measure("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    started = monotonic()
    taken = {name: tensor for name, tensor in tensors.items() if name.startswith(TAKEN)}
    write_shards(to, {name: _empty(to, tensor) for name, tensor in taken.items()})
    return {
        "tensors": len(tensors),
        "taken": len(taken),
        "bytes": sum(tensor.size for tensor in taken.values()),
        "largest": max(tensor.size for tensor in tensors.values()),
        "plan": planned - before,
        "plan_seconds": seconds,
        "peak": measure("VmHWM") - rest,
        "seconds": monotonic() - started,
    }


def _empty(folder: Path, tensor: Pending) -> Pending:
    """``tensor``, before which what is written already loses its bytes, though not its place."""

    def make(make: Callable[[], Tensor]) -> Tensor:
        for file in folder.glob("*.safetensors"):
            os.truncate(file, 0)
        return make()

    return tensor._replace(make=partial(make, tensor.make))


def measure(key: str) -> int:
    """Bytes of this process: what it has in memory (VmRSS), or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def run(fp8: bool) -> dict[str, float]:
    """What an export takes, in a process of its own."""
    with TemporaryDirectory() as place:
        folder, to = Path(place, "00001000"), Path(place, "out")
        folder.mkdir()
        to.mkdir()
        save_stand_in(folder, load_model())
        command = [sys.executable, __file__, str(folder), str(to), *(["fp8"] if fp8 else [])]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        apparent = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return json.loads(done.stdout) | {"checkpoint": apparent, "manifest": (folder / MANIFEST).stat().st_size}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(json.dumps(export_part(Path(sys.argv[1]), Path(sys.argv[2]), "fp8" in sys.argv)))
    else:
        for wanted in (False, True):
            print("fp8" if wanted else "bf16", *(f"  {k:<13}{v:>20,.0f}" for k, v in run(wanted).items()), sep="\n")
