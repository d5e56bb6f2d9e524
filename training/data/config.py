"""Configuration of the text that a run trains on. Standard library only."""

from dataclasses import dataclass
from enum import StrEnum


class Malformed(StrEnum):
    """What happens where a record of ``data.corpus`` is none, or has no text."""

    skip = "skip"  # it is left out, counted and named
    fail = "fail"  # preparing ends there


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Text, its tokens and their packing into sequences."""

    sequence_length: int
    corpus: tuple[str, ...] = ("stdlib",)  # "stdlib": the running Python's source; else text files or folders
    tokenizer: str = "bytes"  # "bytes", or the path of a Hugging Face tokenizer.json
    eos: str | None = None  # the tokenizer's token that ends a document; null: what it says, or a usual name
    folder: str = "data"  # token files live here, one folder per (corpus, tokenizer)
    field: str = "text"  # of JSONL, Parquet and Arrow records: where their text is; a.b: b of the object a
    malformed: Malformed = Malformed.skip
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
        if not all(self.field.split(".")):
            raise ValueError(f"data.field={self.field} must be a name, or names with dots between them")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out={self.held_out} must lie between 0 and 1: it is a share of the text")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"data.workers={self.workers} must be at least 1 (null: all cores)")
        if not self.verify_gigabytes >= 0:
            raise ValueError(f"data.verify_gigabytes={self.verify_gigabytes} must not be negative")
