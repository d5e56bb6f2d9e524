"""What a run is made of between two steps, as named tensors and a few facts: collected to be kept, and put back.

    master/<parameter>, m/<p>, v/<p>    the engine's, each element on one rank; experts by their numbers, not slots
    buffer/<name>                       routers' biases; written by the first rank of the first stage that has them
    places/<block>                      the slot of every expert, where they move between ranks
    placer/load                         what experts got since they last moved
    rng/<rank>                          the state of torch's generator: nothing draws from it in training

A model's weights are its masters, rounded. Names, shapes and offsets are those of the whole model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parallel.exchange import find_exchanges
from parallel.topology import Axis
from training.checkpoint.manifest import Manifest
from training.chunk import Chunk
from training.engine import State
from training.setup import Setup


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # the next one
    skipped: int = 0  # steps in a row, just now, whose loss or gradient was not finite
    seconds: float = 0.0  # that it has taken, with what it took before it was resumed


def collect(setup: Setup) -> list[Chunk]:
    """This rank's part: views, together with all other ranks' each element once."""
    return [
        *_number_experts(setup, setup.engine.state().chunks),
        *(_whole(f"buffer/{name}", tensor) for name, tensor in _find_buffers(setup).items() if _writes(setup, name)),
        *(_whole(name, places) for name, places in _find_places(setup) if _writes(setup, name.partition("/")[2])),
        *([_whole("placer/load", setup.placer.load)] if setup.placer.load is not None and not setup.mesh.rank else []),
        _whole(_name_generator(setup), torch.get_rng_state()),
    ]


def describe(setup: Setup, progress: Progress) -> dict[str, Any]:
    """The facts: where the run is, and what it is."""
    topology, pipeline = setup.mesh.topology, setup.runner.pipeline
    length = setup.config.data.sequence_length
    return {
        "step": progress.step,
        "sequences": setup.schedule.before(progress.step),
        "tokens": setup.schedule.before(progress.step) * length,
        "skipped": progress.skipped,
        "seconds": progress.seconds,
        "updates": setup.engine.state().steps,
        "since_move": setup.placer.steps,
        "topology": {axis: topology.degree(Axis[axis]) for axis in ("pp", "dp", "cp", "tp", "ep")},
        "layers": [[layers.start, layers.stop] for layers in pipeline.layers],
        "stages": [list(ranks) for ranks in pipeline.stage_map.holders_of],
        **setup.facts(),
        "config": asdict(setup.config),
    }


def read(setup: Setup, folder: Path, manifest: Manifest) -> None:
    """Fills what this rank has from the checkpoint in ``folder``; no rank waits for another. ``accept`` follows.

    Raises as ``training.checkpoint.plan.load``, and ValueError for another model's checkpoint.
    """
    from training.checkpoint.plan import load  # which takes as long to load as all of ours

    check_model(setup, manifest, folder)
    if setup.config.parallel.rebalance_every:
        for name, places in _find_places(setup):
            if name in manifest.tensors:
                load(folder, manifest, [_whole(name, places)])
    chunks = [
        *_number_experts(setup, setup.engine.held()),
        *(_whole(f"buffer/{name}", tensor) for name, tensor in _find_buffers(setup).items()),
    ]
    if "placer/load" in manifest.tensors:
        shape = manifest.tensors["placer/load"].shape
        setup.placer.load = torch.zeros(shape, dtype=torch.float64, device=setup.mesh.device)
        chunks.append(_whole("placer/load", setup.placer.load))
    generator = torch.get_rng_state()
    if (name := _name_generator(setup)) in manifest.tensors:
        chunks.append(_whole(name, generator))
    load(folder, manifest, chunks)
    torch.set_rng_state(generator)


def accept(setup: Setup, manifest: Manifest) -> Progress:
    """The engine takes over what ``read`` has put into its state. Collective over all ranks."""
    run = manifest.run
    setup.engine.load(State(int(run["updates"]), setup.engine.held()))
    setup.placer.steps = int(run["since_move"])
    return Progress(int(run["step"]), int(run["skipped"]), float(run["seconds"]))


def check_model(setup: Setup, manifest: Manifest, folder: Path) -> None:
    """Raises ValueError, naming the first key, where the checkpoint is of another model."""
    here, there = _flatten(asdict(setup.config.model)), _flatten(manifest.run["config"]["model"])
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key):
            raise ValueError(
                f"model.{key}={here.get(key)} must be {there.get(key)}, as in the checkpoint {folder}: choose another "
                "run.id for another model"
            )


def _number_experts(setup: Setup, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Chunks of experts' tensors, whose rows are slots, as chunks whose rows are experts."""
    orders = {
        f"{name}.experts.routed.": exchange.places.argsort().tolist()  # the expert in each slot
        for name, exchange in find_exchanges(setup.stages.values()).items()
    }
    moved = {prefix: order for prefix, order in orders.items() if order != sorted(order)}
    for chunk in chunks:
        parameter = chunk.name.partition("/")[2]
        order = next((order for prefix, order in moved.items() if parameter.startswith(prefix)), None)
        if order is None:
            yield chunk
            continue
        for row, expert in enumerate(order[chunk.offset[0] : chunk.offset[0] + len(chunk.tensor)]):
            yield chunk._replace(offset=(expert, *chunk.offset[1:]), tensor=chunk.tensor[row : row + 1])


def _find_buffers(setup: Setup) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for model in setup.stages.values():
        found |= {name: buffer.detach() for name, buffer in model.named_buffers()}
    return found


def _find_places(setup: Setup) -> Iterator[tuple[str, Tensor]]:
    for name, exchange in find_exchanges(setup.stages.values()).items():
        yield f"places/{name}", exchange.places


def _writes(setup: Setup, name: str) -> bool:
    """Whether this rank writes what every rank of its stage has: of the pipeline ranks that have it, the first."""
    mesh = setup.mesh
    across = setup.runner.pipeline.across(name, setup.config.model)
    return mesh.coordinate(Axis.pp) == across[0] and mesh.coordinate(Axis.stage) == 0


def _name_generator(setup: Setup) -> str:
    return f"rng/{setup.mesh.rank}"


def _whole(name: str, tensor: Tensor) -> Chunk:
    return Chunk(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots between; tuples as the lists that JSON makes of them."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat
