"""What a run is made of between two steps, as named tensors and a few facts: collected to be kept, and put back.

    master/<parameter>, m/<p>, v/<p>    the engine's, each element on one rank; experts by their numbers, not slots
    buffer/<name>                       routers' biases; written by the first rank of the first stage that has them
    places/<block>                      the slot of every expert, where they move between ranks
    ema/<parameter>                     their average, where there is one (training/average.py)
    placer/load                         what experts got since they last moved
    rng/<rank>                          the state of torch's generator: nothing draws from it in training

Before the first update there may be no m and v. A model's weights are its masters, rounded. Names, shapes and offsets
are those of the whole model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.exchange import find_exchanges
from parallel.topology import Axis
from training.checkpoint.facts import check_model, has_average
from training.checkpoint.folders import Manifest, Place
from training.chunk import Chunk
from training.config import SHARE
from training.engine import State
from training.setup import Setup

MOMENTS = ("m/", "v/")


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0  # the next one
    skipped: int = 0  # steps in a row, just now, whose loss or gradient was not finite
    seconds: float = 0.0  # that it has taken, with what it took before it was resumed
    best: tuple[
        tuple[float, int], ...
    ] = ()  # the lowest held-out losses, and the steps after which there is a checkpoint
    near: bool = False  # begun from near copies: there may be no checkpoint of where that was


def collect(setup: Setup) -> list[Chunk]:
    """This rank's part: views, together with all other ranks' each element once."""
    return [
        *_number_experts(setup, [*setup.engine.state().chunks, *setup.average.chunks()]),
        *(_whole(f"buffer/{name}", tensor) for name, tensor in _find_buffers(setup).items() if _writes(setup, name)),
        *(_whole(name, places) for name, places in _find_places(setup) if _writes(setup, name.partition("/")[2])),
        *([_whole("placer/load", setup.placer.load)] if setup.placer.load is not None and not setup.mesh.rank else []),
        _whole(_name_generator(setup), torch.get_rng_state()),
    ]


def hold(setup: Setup) -> list[Chunk]:
    """All that this rank would load: views, whatever other ranks have too. For ``read`` on the same rank."""
    return [
        *_number_experts(setup, [*setup.engine.held(), *setup.average.chunks()]),
        *(_whole(f"buffer/{name}", tensor) for name, tensor in _find_buffers(setup).items()),
        *(_whole(name, places) for name, places in _find_places(setup)),
        *([_whole("placer/load", setup.placer.load)] if setup.placer.load is not None else []),
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
        "best": progress.best,
        "updates": setup.engine.state().steps,
        "since_move": setup.placer.steps,
        "topology": {axis: topology.degree(Axis[axis]) for axis in ("pp", "dp", "cp", "tp", "ep")},
        "layers": [[layers.start, layers.stop] for layers in pipeline.layers],
        "stages": [list(ranks) for ranks in pipeline.stage_map.holders_of],
        **setup.facts(),
        "config": asdict(setup.config),
    }


def read(setup: Setup, folder: Place, manifest: Manifest) -> None:
    """Fills what this rank has from the checkpoint in ``folder``; no rank waits for another. ``accept`` follows.

    Raises as ``training.checkpoint.plan.load``, and ValueError for another model's checkpoint.
    """
    from training.checkpoint.plan import load  # which takes as long to load as all of ours

    share = SHARE[setup.config.checkpoint.check]
    check_model(manifest, asdict(setup.config.model), str(folder), "choose another run.id for another model")
    if setup.config.parallel.rebalance_every:
        for name, places in _find_places(setup):
            if name in manifest.tensors:
                load(folder, manifest, [_whole(name, places)], share)
    chunks = [
        *_number_experts(setup, [*setup.engine.held(), *(setup.average.chunks() if has_average(manifest) else ())]),
        *(_whole(f"buffer/{name}", tensor) for name, tensor in _find_buffers(setup).items()),
    ]
    if "placer/load" in manifest.tensors:
        shape = manifest.tensors["placer/load"].shape
        setup.placer.load = torch.zeros(shape, dtype=torch.float64, device=setup.mesh.device)
        chunks.append(_whole("placer/load", setup.placer.load))
    generator = torch.get_rng_state()
    if (name := _name_generator(setup)) in manifest.tensors:
        chunks.append(_whole(name, generator))
    chunks = chunks if manifest.run["updates"] else list(_begin_moments(chunks, manifest))
    load(folder, manifest, chunks, share)
    torch.set_rng_state(generator)


def accept(setup: Setup, manifest: Manifest) -> Progress:
    """The engine takes over what ``read`` has put into its state. Collective over all ranks."""
    run = manifest.run
    setup.engine.load(State(int(run["updates"]), setup.engine.held()))
    setup.placer.steps = int(run["since_move"])
    if not has_average(manifest):
        setup.average.begin()
    best = tuple((float(loss), int(step)) for loss, step in run.get("best", ()))
    return Progress(int(run["step"]), int(run["skipped"]), float(run["seconds"]), best)


def _begin_moments(chunks: Iterable[Chunk], manifest: Manifest) -> Iterator[Chunk]:
    """What there is to load before the first update: moments that are not there are zero, as that update finds them."""
    for chunk in chunks:
        if chunk.name.startswith(MOMENTS) and chunk.name not in manifest.tensors:
            chunk.tensor.zero_()
        else:
            yield chunk


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
