"""A trained model, from a run's configuration and its saved weights."""

from pathlib import Path

from configs.schema import TrainConfig
from model.build import allocate
from model.transformer import Transformer
from training import determinism
from training.config import Device
from training.data.tokenizer import Tokenizer, load_tokenizer
from training.save import load


def restore(config: TrainConfig, weights: Path, device: Device, threads: int | None) -> tuple[Transformer, Tokenizer]:
    """The model that ``config`` trained, with the ``weights`` saved, on ``device``; and its tokenizer.

    Raises ValueError for a device that is not there and for weights that are missing, damaged or another model's.
    """
    place = determinism.choose_device(device)
    determinism.fix_numerics(place, threads)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eos)
    dtype, recipe = determinism.NUMERICS[config.precision]
    model = allocate(config.model, dtype, place, recipe)
    load(model, weights)
    return model, tokenizer
