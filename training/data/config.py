"""Configuration of the text that a run trains on. Standard library only."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

STDLIB = "stdlib"
Knots = list[tuple[float, float]]  # share of the run, weight


class Chat(StrEnum):
    """How conversations are written: training/data/chat.py."""

    chatml = "chatml"
    llama3 = "llama3"
    deepseek = "deepseek"


class Malformed(StrEnum):
    """What happens where a record of ``data.corpus`` is none, or has no text."""

    skip = "skip"  # it is left out, counted and named
    fail = "fail"  # preparing ends there


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, its tokens and their packing into sequences."""

    sequence_length: int
    corpus: tuple[str, ...] = (STDLIB,)  # "stdlib": the running Python's source; else text files or folders
    # Instead of corpus: {web: 0.7, code: '0.3 0.8:0.3 1:0.6'}, weights that may change over the run.
    mixture: dict[str, str] = dataclasses.field(default_factory=dict)
    tokenizer: str = "bytes"  # "bytes", or the path of a Hugging Face tokenizer.json
    eos: str | None = None  # the tokenizer's token that ends a document; null: what it says, or a usual name
    folder: str = "data"  # token files live here, one folder per (corpus, tokenizer)
    field: str = "text"  # of JSONL, Parquet and Arrow records: where their text is; a.b: b of the object a
    malformed: Malformed = Malformed.skip
    # Records are conversations, in data.field (messages), to be fine-tuned on: answers count, and are not cut.
    chat: Chat | None = None
    fim: float = 0.0  # share of the documents to train on that have their middle at the end: training/data/middle.py
    held_out: float = 0.05  # share of the documents kept for evaluation: chosen by file, records by their text
    mask_documents: bool = False  # tokens do not attend across document boundaries
    seed: int = 0  # of the shuffle
    workers: int | None = None  # processes that tokenise; null: all cores
    verify_gigabytes: float = 16.0  # token files read at start to check their checksums; sizes always are

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise ValueError(f"data.sequence_length={self.sequence_length} must be at least 1")
        if not self.corpus:
            raise ValueError("data.corpus=() must name a text: stdlib, files or folders")
        if self.mixture and self.corpus != (STDLIB,):
            raise ValueError(
                f"data.corpus={','.join(self.corpus)} must be left out with data.mixture, which names corpora too"
            )
        parse_weights(self.mixture)
        if not all(self.field.split(".")):
            raise ValueError(f"data.field={self.field} must be a name, or names with dots between them")
        if self.chat is not None and self.fim:
            raise ValueError(
                f"data.fim={self.fim} must be 0 with data.chat={self.chat}: conversations keep their order"
            )
        if not 0 <= self.fim <= 1:
            raise ValueError(f"data.fim={self.fim} must lie in 0..1: it is a share of the documents")
        if not 0 < self.held_out <= 1:
            raise ValueError(f"data.held_out={self.held_out} must lie between 0 and 1: it is a share of the text")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"data.workers={self.workers} must be at least 1 (null: all cores)")
        if not self.verify_gigabytes >= 0:
            raise ValueError(f"data.verify_gigabytes={self.verify_gigabytes} must not be negative")


def name_field(data: DataConfig) -> str:
    """Where records have what is trained on."""
    return "messages" if data.chat is not None and data.field == "text" else data.field


def parse_weights(mixture: Mapping[str, str]) -> dict[str, Knots]:
    """The weights of each corpus: where in the run, and which. ValueError, by name, for what is none."""
    found: dict[str, Knots] = {}
    for name, text in mixture.items():
        try:
            first, *rest = str(text).split()
            knots = [(0.0, float(first)), *(_parse_knot(word) for word in rest)]
        except ValueError:
            knots = []
        shares = [share for share, _ in knots]
        good = all(0 <= weight < float("inf") for _, weight in knots) and shares == sorted(set(shares))
        if not knots or not good or shares[-1] > 1:
            raise ValueError(
                f"data.mixture.{name}={text} must be a weight, or a weight and then share:weight, shares of the run "
                "ascending from above 0 to 1: '0.7 0.8:0.7 1:0.2'"
            )
        found[name] = knots
    return found


def _parse_knot(word: str) -> tuple[float, float]:
    share, _, weight = word.partition(":")
    return float(share), float(weight)
