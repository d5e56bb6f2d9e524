"""A trained model, from a run's configuration and its saved weights."""

from pathlib import Path

from configs.schema import TrainConfig
from model.build import allocate
from model.transformer import Transformer
from training import determinism
from training.config import Device
from training.data.tokenizer import Tokenizer, load_tokenizer
from training.kept import Kept
from training.save import load
from training.source import open_kept
from training.weights import fill


def restore(config: TrainConfig, weights: Path, device: Device, threads: int | None) -> tuple[Transformer, Tokenizer]:
    """The model that ``config`` trained, with the ``weights`` saved, on ``device``; and its tokenizer.

    Raises ValueError for a device that is not there and for weights that are missing, damaged or another model's.
    """
    model, tokenizer = _prepare(config, device, threads)
    load(model, weights)
    return model, tokenizer


def restore_kept(config: TrainConfig, kept: Kept, device: Device, threads: int | None) -> tuple[Transformer, Tokenizer]:
    """The same with the weights ``kept``, a checkpoint's for example, in the precision of ``config``."""
    model, tokenizer = _prepare(config, device, threads)
    fill({0: model}, {}, open_kept(kept, config))
    return model, tokenizer


def _prepare(config: TrainConfig, device: Device, threads: int | None) -> tuple[Transformer, Tokenizer]:
    place = determinism.choose_device(device)
    determinism.fix_numerics(place, threads)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos)
    dtype, recipe = determinism.NUMERICS[config.precision]
    return allocate(config.model, dtype, place, recipe), tokenizer
