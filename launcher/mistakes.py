"""What is wrong with a run, and what is seldom meant, as far as that can be told without starting it. No torch."""

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

from configs.cluster import Scheduler
from configs.schema import RunConfig, Verify
from launcher.layout import divide_layers
from launcher.ranks import check_layout
from parallel.topology import Topology
from training.footprint import Bytes, estimate


def find_mistakes(config: RunConfig) -> Iterator[str]:
    """A line for each thing that would end the run, or keep it from starting."""
    try:
        topology = check_layout(config, None)
    except ValueError as error:
        yield str(error)  # what follows needs a layout
    else:
        yield from _check_memory(config, topology)
        yield from _collect(lambda: _check_proof(config, topology))
    yield from _check_text(config)
    yield from _check_folders(config)
    yield from _collect(lambda: _check_weights(config))
    for sink in config.run.sinks:
        if find_spec(sink.value) is None:
            yield f"run.sinks: {sink} needs a package that is not installed: pip install 'shoestring[{sink}]'"


def report(mistakes: list[str]) -> None:
    """Says what is wrong, a line each."""
    for mistake in mistakes:
        print(f"shoestring: {' '.join(mistake.split())}", file=sys.stderr)


def find_notes(config: RunConfig) -> Iterator[str]:
    """What is allowed and seldom meant."""
    slurm = config.cluster.scheduler is Scheduler.slurm
    asks = {"gres", "gpus", "gpus-per-node", "gpus-per-task"} & set(config.cluster.additional_parameters)
    if slurm and config.run.device != "cpu" and config.cluster.gres is None and not asks:
        yield f"no devices are asked for: cluster.gres=gpu:{config.cluster.devices_per_node} on most clusters"
    if slurm and not config.checkpoint.every and config.checkpoint.minutes is None:
        yield "no checkpoints: a job that is requeued begins anew (checkpoint.minutes, checkpoint.every)"
    if slurm and config.cluster.timeout_min is None:
        yield "no time limit: the partition's counts (cluster.timeout_min)"


def weigh(config: RunConfig, topology: Topology) -> Bytes:
    """What a rank holds besides activations."""
    return estimate(config, topology, divide_layers(config, topology))


def _check_memory(config: RunConfig, topology: Topology) -> Iterator[str]:
    room = config.cluster.device_gigabytes
    if room is not None and (held := weigh(config, topology).total) > room * 1e9:
        yield (
            f"cluster.device_gigabytes={room} must be at least {held / 1e9:.4g}, what a rank's weights, gradients and "
            "optimizer's state take: spread them over more ranks (parallel.pp, parallel.tp, parallel.ep or "
            "parallel.dp), or choose optimizer.moments=bf16"
        )


def _check_proof(config: RunConfig, topology: Topology) -> None:
    if config.verify is not Verify.require or topology.world == 1:
        return
    from launcher import proofs  # numpy
    from training.proof.shrink import shrink

    folder = proofs.locate(config.proofs)
    if proofs.find(folder, proofs.identify(shrink(config, topology).cases)) is None:
        raise ValueError(f"verify=require: this layout has no proof in {folder}; `shoestring verify` makes one")


def _check_text(config: RunConfig) -> Iterator[str]:
    from training.data.corpus import find_sources
    from training.data.tokenizer import check_vocabulary, load_tokenizer

    data = config.data
    for name in data.corpus:
        yield from _collect(lambda name=name: find_sources((name,)))  # type: ignore[misc]
    if len(set(data.corpus)) < len(data.corpus):
        yield f"data.corpus=[{','.join(data.corpus)}] must name each text once"
    yield from _collect(lambda: check_vocabulary(load_tokenizer(data.tokenizer, data.eos), config.model.vocab_size))


def _check_folders(config: RunConfig) -> Iterator[str]:
    keys = {"run.folder": config.run.folder, "data.folder": config.data.folder, "proofs": config.proofs}
    place = config.checkpoint.folder
    if place is not None and "://" not in place:
        keys["checkpoint.folder"] = place
    for key, name in keys.items():
        if name is not None and (problem := _cannot_write(Path(name))):
            yield f"{key}={name} must be a folder that takes files: {problem}"
    if place is not None and "://" in place:
        from training.checkpoint.place import parse

        yield from _collect(lambda: parse(place))
    path = config.run.id and Path(config.run.folder) / config.run.id
    if path and path.exists() and config.checkpoint.resume == "never":
        yield (
            f"run.id={config.run.id} is taken: {path} exists; choose another id, or go on with that run by "
            "checkpoint.resume=auto"
        )


def _cannot_write(folder: Path) -> str:
    """Why no file can be made in ``folder``, which may have to be made first; nothing where one can."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} takes none from you"


def _check_weights(config: RunConfig) -> None:
    if config.init_from is None:
        return
    from model.huggingface_config import compare

    folder = Path(config.init_from)
    if not folder.is_dir():
        raise ValueError(f"init_from={folder} must be a folder of weights in Hugging Face format: there is none")
    compare(config.model, folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"init_from={folder} must have weights in it: there is no file *.safetensors")


def _collect(check: Callable[[], object]) -> Iterator[str]:
    """What ``check`` complains of."""
    try:
        check()
    except ValueError as error:
        yield str(error)
