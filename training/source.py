"""Weights that a run has left, to be read a slice at a time: those of a checkpoint, or the last ones."""

from dataclasses import asdict
from pathlib import Path

from configs.schema import TrainConfig
from model.huggingface import Source
from training.checkpoint import folders
from training.checkpoint.facts import check_model
from training.checkpoint.place import parse
from training.checkpoint.weights import list_weights, open_weights
from training.kept import Kept
from training.save import open_saved


def open_kept(kept: Kept, config: TrainConfig) -> Source:
    """The tensors of the whole model, in the precision that its run had.

    Raises ValueError for what cannot be read, for another model's, and for an average where there is none.
    """
    if kept.checkpoint:
        place = parse(kept.place)
        manifest = folders.read_manifest(place)
        check_model(manifest, asdict(config.model), kept.place, "choose another run")
        return open_weights(place, manifest, config.model, kept.average)
    source = open_saved(Path(kept.place))
    if missing := sorted(list_weights(config.model, config.precision).keys() ^ source.shapes().keys()):
        raise ValueError(f"{kept.place} does not fit the model: {', '.join(missing[:5])} on one side only")
    return source
