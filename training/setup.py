"""Everything a run needs, made from its configuration in one place and in one order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.schema import TrainConfig
from model.build import allocate, build
from model.transformer import Transformer
from training import determinism
from training.compilation import decide_compile
from training.optimizer import AdamW
from training.ramp import BatchSchedule, schedule_batches
from training.text import Text, open_text


@dataclass(frozen=True, slots=True)
class Setup:
    """A run that is ready to take its first step."""

    config: TrainConfig
    device: torch.device
    text: Text
    schedule: BatchSchedule
    model: Transformer
    compiled: bool
    optimizer: AdamW
    facts: dict[str, object]  # what the record opens with


def set_up(config: TrainConfig, report: Callable[[str], None]) -> Setup:
    """Prepares the text, builds the model and hands its parameters to the optimizer.

    ``report`` gets lines for a person. Raises ValueError for what does not fit: a device that is not there, a
    vocabulary too small, damaged token files or weights.
    """
    device = determinism.choose_device(config.run.device)
    threads = determinism.fix_numerics(device, config.run.threads, config.run.deterministic)
    compiled, reason = decide_compile(config, device.type)
    text = open_text(config, report)
    model = build_model(config, device)
    optimizer = AdamW(model.named_parameters(), config.optimizer)
    if compiled:
        from model.compile import compile_segments

        compile_segments(model)
    name = determinism.name_device(device)
    report(f"{config.model.name} in {config.precision} on {name}, {threads} threads; {reason}")
    facts = {
        "torch": torch.__version__,
        "device": name,
        "threads": threads,
        "compiled": compiled,
        "data": text.digest,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    schedule = schedule_batches(config.run, config.data.sequence_length)
    return Setup(config, device, text, schedule, model, compiled, optimizer, facts)


def build_model(config: TrainConfig, device: torch.device) -> Transformer:
    """The model with its first weights: drawn from ``run.seed``, or those in ``init_from``."""
    dtype = determinism.DTYPES[config.precision]
    if config.init_from is None:
        return build(config.model, dtype, device, config.run.seed)
    from model.huggingface import load

    model = allocate(config.model, dtype, device)
    load(model, Path(config.init_from))
    return model
