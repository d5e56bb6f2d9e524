"""What to say when memory runs out: where, how much was asked for, what holds the rest, and which key to lower."""

import re
from typing import Any

import torch

from model.config import Recompute
from parallel.doing import read_error
from training.determinism import measure_free_memory, measure_peak_memory
from training.setup import Setup

# What torch's allocators say, on a CPU and on accelerators, and what numpy and Python do.
ASKED = re.compile(r"(?:tried to allocate|Unable to allocate) ([\d.]+) ?(bytes|[KMGT]iB)?")
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class OutOfMemoryError(RuntimeError):
    """Memory ran out in the middle of a run, which had been enough before."""


def ran_out(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory left."""
    kinds: tuple[Any, ...] = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def explain(error: BaseException, setup: Setup) -> str:
    """The message of a rank on which ``error`` was raised."""
    device = setup.mesh.device
    state, free, peak = count_state(setup), measure_free_memory(device), measure_peak_memory(device)
    return (
        f"rank {setup.mesh.rank} ran out of memory in {read_error(error)}: {_ask(error)} more were asked "
        f"for, {_write(free)} are free on {device}. It has held {_write(peak)}, of which {_write(state)} are weights, "
        f"gradients and the optimizer's state, and the rest activations and the program. {advise(setup, state, peak)}"
    )


def count_state(setup: Setup) -> int:
    """Bytes of this rank's weights, their gradients, masters and moments: its part, as it is spread now."""
    held = sum(chunk.tensor.nbytes for chunk in setup.engine.held())
    weights = sum(p.nbytes for stage in setup.stages.values() for p in stage.parameters())
    wide = max(4, next((p.itemsize for stage in setup.stages.values() for p in stage.parameters()), 4))
    elements = sum(p.numel() for stage in setup.stages.values() for p in stage.parameters())
    return held + weights + wide * elements


def advise(setup: Setup, state: int, peak: int) -> str:
    """Which key to change first: what most of it depends on."""
    config = setup.config
    if 2 * state > peak:
        return (
            "Most of it is state: spread it over more ranks (parallel.pp, parallel.tp, parallel.ep or parallel.dp), or "
            "choose optimizer.moments=bf16"
        )
    if config.run.micro_batch > 1:
        return f"Lower run.micro_batch={config.run.micro_batch}: activations shrink with it"
    if config.model.recompute is not Recompute.full:
        return f"Raise model.recompute={config.model.recompute} to selective or full: activations are computed twice"
    return f"Lower data.sequence_length={config.data.sequence_length}, or split it: parallel.tp, parallel.pp"


def _ask(error: BaseException) -> str:
    found = ASKED.search(str(error))
    return _write(int(float(found[1]) * UNITS[found[2] or "bytes"])) if found else "some bytes"


def _write(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 10**9 else f"{size / 1e6:.1f} MB"
