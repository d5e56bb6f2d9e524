"""Named texts to be measured on: what a run holds out of its own, or texts of which all is held out."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from configs.schema import TrainConfig
from parallel.mesh import Mesh
from training.agree import wait_for_all
from training.data.config import DataConfig
from training.data.index import NAME, read_index
from training.data.mixture import Sequences
from training.data.prepare import Report, prepare
from training.data.tokenizer import check_vocabulary
from training.text import pack

OWN = "held_out"  # what a run's own text is called, where it is one


class Measurable(NamedTuple):
    """A text that is open."""

    sequences: Sequences
    tokens: int
    size: int | None  # bytes of UTF-8; None where nobody knows, or where not all of them count


def open_shared_sets(config: TrainConfig, sets: dict[str, str], report: Report, mesh: Mesh) -> dict[str, Measurable]:
    """``open_sets`` on every rank: rank 0 prepares and checks, then the others open what it made. Collective."""
    first = open_sets(config, sets, report) if mesh.rank == 0 else None
    wait_for_all(mesh)
    return first or open_sets(replace(config, data=replace(config.data, verify_gigabytes=0.0)), sets, report)


def open_sets(config: TrainConfig, sets: dict[str, str], report: Report) -> dict[str, Measurable]:
    """The texts ``sets`` by name, all of each; without any, what ``config.data`` holds out, of a mixture by corpus.

    Raises ValueError as ``prepare``, and for a tokenizer with more tokens than the model.
    """
    found = {}
    for name, data in choose(config.data, sets).items():
        text = prepare(data, report)
        check_vocabulary(text.tokenizer, config.model.vocab_size)
        # Of conversations, answers alone are measured.
        known = bool(text.shards) and data.chat is None
        size = sum(shard.text_bytes for shard in text.shards["held_out"]) if known else None
        found[name] = Measurable(pack(config, text.held_out, seed=0), text.held_out.tokens, size)
    return found


def choose(data: DataConfig, sets: dict[str, str]) -> dict[str, DataConfig]:
    """What to prepare for each."""
    if sets:
        return {name: _take_all(data, text) for name, text in sets.items()}
    if data.mixture:
        return {name: replace(data, corpus=(name,), mixture={}) for name in data.mixture}
    return {OWN: data}


def _take_all(data: DataConfig, corpus: str) -> DataConfig:
    folder, held_out, fim = Path(corpus).expanduser(), 1.0, 0.0
    if (folder / NAME).is_file():  # it is prepared: what is held out of it has been chosen
        identity = read_index(folder).identity
        held_out, fim = identity["held_out"], identity.get("fim", 0.0)
    return replace(data, corpus=(corpus,), mixture={}, held_out=held_out, fim=fim)
