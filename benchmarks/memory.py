"""What a rank holds, by engine and layout: counted in its tensors, seen by the system, and by the engine's formula.

    python benchmarks/memory.py                      every engine, preset small in bfloat16
    python benchmarks/memory.py native --moments bf16

counted   storages of all tensors that can be reached from the model and its engine, each once however many views of
          it: when the step's gradients are ``added up``, when ranks have ``summed`` them, and when the step is ``over``
formula   for the first of these: bytes a parameter, from its dtype and the number of its holders alone: see
          training/footprint.py
process   anonymous memory of the process then, all that is free given back, above what it had before the model; when
          the step is over; and at its peak, which has activations in it

All ranks are processes of their own, over gloo. Everything is done twice, and weighed the second time: what libraries
load and keep at their first calls is no engine's. Figures are of the rank that holds most.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from launcher.compose import Composer
from model.batch import Batch, Denominators
from model.precision import Numerics
from parallel.build import build_sharded
from parallel.config import EngineName
from parallel.mesh import Mesh, connect, disconnect
from parallel.placement import Shard
from parallel.topology import Axis, Topology
from training.config import MomentDtype, OptimizerConfig
from training.engine import Engine
from training.engines import build_engine
from training.footprint import FORMULAS, Bytes

LAYOUTS = {
    "dp=1": Topology(),
    "dp=2": Topology(dp=2),
    "dp=4": Topology(dp=4),
    "dp=4 ep=2": Topology(dp=4, ep=2),
}
MICRO, LENGTH = 2, 64  # a micro-batch of a rank; two a step
MIB = 2**20
TITLES = ("weights", "moments", "added up", "summed", "over", "counted", "formula", "ratio", "then", "over", "peak")


def find_storages(*roots: object) -> dict[int, int]:
    """Bytes of every storage of a tensor that can be reached from ``roots``, by address."""
    seen, waiting, found = dict[int, object](), list[object](roots), dict[int, int]()
    while waiting:
        held = waiting.pop()
        # What a function's module has is nobody's own.
        if id(held) in seen or isinstance(held, type | ModuleType | BuiltinFunctionType | str | int | float):
            continue
        seen[id(held)] = held  # kept: the address of what is gone may be another's
        if isinstance(held, FunctionType):
            waiting += [cell.cell_contents for cell in held.__closure__ or ()] + [held.__defaults__]
            continue
        if isinstance(held, DTensor):
            waiting.append(held.to_local())
        elif isinstance(held, Tensor) and held.device.type != "meta":
            found |= _list_storages([held])
        if isinstance(held, Tensor) and held.is_leaf:
            waiting.append(held.grad)
        waiting += gc.get_referents(held)
    return found


def count(model: nn.Module, engine: Engine) -> list[float]:
    """Bytes of this rank: of weights and masters, of moments, and of all else, which is gradients and buckets."""
    chunks = engine.state().chunks
    weights = [p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for p in model.parameters()]
    weights += [chunk.tensor for chunk in chunks if chunk.name.startswith("master/")]
    moments = [chunk.tensor for chunk in chunks if chunk.name.startswith(("m/", "v/"))]
    named = [_list_storages(weights), _list_storages(moments)]
    rest = {at: size for at, size in find_storages(model, engine).items() if not any(at in some for some in named)}
    return [sum(storages.values()) for storages in (*named, rest)]


def _list_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def predict(name: EngineName, shards: dict[str, Shard], mesh: Mesh, moments: MomentDtype) -> Bytes:
    """Bytes of this rank by the formula, from shapes alone."""
    parts = []
    for key, shard in shards.items():
        axis = shard.placement.holders
        if name is EngineName.fsdp2 and shard.placement.axis is not Axis.ep:
            axis = Axis.replicas
        wide = key.endswith("router.weight")
        a_parameter = FORMULAS[name](4 if wide else 2, wide, 4 if moments is MomentDtype.bf16 else 8, mesh.degree(axis))
        parts.append([math.prod(shard.shape) * each for each in a_parameter])
    return Bytes(*map(sum, zip(*parts, strict=True)))


def read_status(field: str) -> int:
    """Bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def settle() -> int:
    """The process' anonymous memory, in bytes, when all that is free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return read_status("RssAnon")


def train(name: EngineName, run: str, moments: MomentDtype, mesh: Mesh) -> dict[str, list[float]]:
    """Two steps of a new model, the second one weighed: bytes by phase, or by kind."""
    start = settle()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    low = read_status("VmHWM")
    config = Composer().compose((f"run={run}",))[0].model
    model, shards = build_sharded(config, Numerics(torch.bfloat16), 0, mesh)
    engine = build_engine(name, {0: model}, shards, mesh, OptimizerConfig(lr=1e-3, moments=moments), torch.bfloat16)
    found: dict[str, list[float]] = {"formula": list(predict(name, shards, mesh, moments))}

    def weigh(phase: str) -> None:
        found[phase] = count(model, engine)
        found[f"process {phase}"] = [settle() - start]

    torch.manual_seed(mesh.rank)
    for _ in range(2):
        engine.begin()
        for _ in range(2):
            run_backward(engine, config.mtp.depth, mesh)
        weigh("added up")
        engine.finished(0)
        engine.settle()
        weigh("summed")
        engine.step(1e-3)
        engine.settle()
        weigh("over")
    return found | {"peak": [read_status("VmHWM") - low]}


def run_backward(engine: Engine, depth: int, mesh: Mesh) -> None:
    """A micro-batch."""
    ids = torch.randint(0, 256, (MICRO, LENGTH + 1))
    labels = (float(2 * MICRO * LENGTH * mesh.degree(Axis.dp)),) * (1 + depth)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), None)
    engine.backward(0, engine.forward(0, batch, Denominators(labels, 2.0 * MICRO * mesh.degree(Axis.dp))).total)


def work(rank: int, names: list[str], run: str, layout: str, moments: str, folder: str) -> None:
    """A rank's process."""
    torch.set_num_threads(1)
    connect(torch.device("cpu"), rank, LAYOUTS[layout].world, Path(folder) / "store")
    mesh = Mesh(LAYOUTS[layout], torch.device("cpu"))
    found = {}
    for name in names:
        for _ in range(2):
            found[name] = train(EngineName(name), run, MomentDtype(moments), mesh)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    disconnect()


def measure(
    names: Sequence[EngineName], run: str, layout: str, moments: MomentDtype
) -> dict[EngineName, dict[str, list[float]]]:
    """Of each engine the rank that holds most."""
    world = LAYOUTS[layout].world
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(work, ([name.value for name in names], run, layout, moments.value, folder), world)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    return {name: max((found[name] for found in ranks), key=lambda found: sum(found["added up"])) for name in names}


def describe(found: dict[str, list[float]]) -> str:
    """A line of MiB."""
    weights, moments, gradients = found["added up"]
    counted, formula = sum(found["added up"]), sum(found["formula"])
    figures = [weights, moments, gradients, found["summed"][2], found["over"][2], counted, formula]
    figures += [sum(found[what]) for what in ("process added up", "process over", "peak")]
    figures = [f"{figure / MIB:9.1f}" for figure in figures]
    return "".join([*figures[:7], f"{counted / formula:9.3f}", *figures[7:]])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", type=EngineName, default=list(EngineName))
    parser.add_argument("--run", default="small", help="whose model")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--moments", type=MomentDtype, default=MomentDtype.master)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    print(f"{'':36}{'gradients':>27}{'all of the tensors':>27}{'the process':>27}")
    print(f"{'MiB':18}{''.join(f'{title:>9}' for title in TITLES)}")
    for layout in options.layouts:
        alike = LAYOUTS[layout].world == LAYOUTS[layout].dp and LAYOUTS[layout].ep == 1
        names = [name for name in options.engines if alike or name is not EngineName.zero3]
        for name, found in measure(names, options.run, layout, options.moments).items():
            print(f"{layout:10}{name:8}{describe(found)}", flush=True)


if __name__ == "__main__":
    main()
