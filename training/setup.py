"""Everything a run needs, made from its configuration in one place and in one order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.build import build
from model.compile import compile_segments
from model.transformer import Transformer
from training import determinism
from training.compilation import decide_compile
from training.data.batches import Batches
from training.data.prepare import prepare
from training.data.tokenizer import Tokenizer, check_vocabulary
from training.data.tokens import TokenFile
from training.optimizer import AdamW
from training.ramp import BatchSchedule, schedule_batches

if TYPE_CHECKING:
    from configs.schema import TrainConfig


@dataclass(frozen=True, slots=True)
class Setup:
    """A run that is ready to take its first step."""

    config: "TrainConfig"
    facts: dict[str, Any]  # what the record opens with
    device: torch.device
    tokenizer: Tokenizer
    train: Batches
    held_out: Batches
    schedule: BatchSchedule
    model: Transformer
    optimizer: AdamW


def set_up(config: "TrainConfig", report: Callable[[str], None]) -> Setup:
    """Prepares the text, builds the model and hands its parameters to the optimizer.

    ``report`` gets lines for a person. Raises ValueError for what does not fit: a device that is not there, a
    vocabulary too small, damaged token files or weights.
    """
    device = determinism.choose_device(config.run.device)
    threads = determinism.fix_numerics(device, config.run.threads, config.run.deterministic)
    compiled, reason = decide_compile(config, device.type)
    data = prepare(config.data, report)
    check_vocabulary(data.tokenizer, config.model.vocab_size)
    model = build_model(config, device)
    optimizer = AdamW(model.named_parameters(), config.optimizer)
    if compiled:
        compile_segments(model)
    name = determinism.name_device(device)
    report(f"{config.model.name} in {config.precision} on {name}, {threads} threads; {reason}")
    facts = {
        "torch": torch.__version__,
        "device": name,
        "threads": threads,
        "compiled": compiled,
        "data": data.index.digest,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    return Setup(
        config=config,
        facts=facts,
        device=device,
        tokenizer=data.tokenizer,
        train=_pack(config, data.train, shuffle=True),
        held_out=_pack(config, data.held_out, shuffle=False),
        schedule=schedule_batches(config.run, config.data.sequence_length),
        model=model,
        optimizer=optimizer,
    )


def build_model(config: "TrainConfig", device: torch.device) -> Transformer:
    """The model with its first weights: drawn from ``run.seed``, or those in ``init_from``."""
    model = build(config.model, determinism.DTYPES[config.precision], device, config.run.seed)
    if config.init_from is not None:
        from model.huggingface import load

        load(model, Path(config.init_from))
    return model


def _pack(config: "TrainConfig", tokens: TokenFile, shuffle: bool) -> Batches:
    return Batches(
        tokens,
        sequence_length=config.data.sequence_length,
        lookahead=1 + config.model.mtp.depth,
        seed=config.data.seed,
        mask_documents=config.data.mask_documents,
        shuffle=shuffle,
    )
