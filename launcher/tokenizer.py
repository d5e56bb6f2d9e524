"""``shoestring tokenizer to=<folder>``: a byte-level BPE of one's own text, as ``data.tokenizer`` takes it."""

import sys
from dataclasses import dataclass
from pathlib import Path

from launcher import cli
from launcher.invocation import Invocation
from training.data.config import STDLIB

SUMMARY = "train a tokenizer on text: a folder for data.tokenizer"
LEAST = 260  # bytes, and the tokens with a meaning of their own


@dataclass(kw_only=True, slots=True)
class Config:
    """Of which text, how large, and where to."""

    to: str  # a folder for tokenizer.json and tokenizer_config.json
    corpus: tuple[str, ...] = (STDLIB,)  # as data.corpus
    field: str = "text"  # as data.field
    held_out: float = 0.05  # as data.held_out: what is held out is not looked at
    vocab_size: int = 32768  # tokens at most
    megabytes: float = 1000.0  # of text looked at, spread evenly where there is more

    def __post_init__(self) -> None:
        if self.vocab_size < LEAST:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least {LEAST}: bytes, and four tokens more")
        if self.megabytes <= 0:
            raise ValueError(f"megabytes={self.megabytes} must be positive")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} must lie in 0..1: it is a share of the text")


def run(config: Config, invocation: Invocation) -> int:
    """Writes the two files."""
    from training.data.corpus import find_sources
    from training.data.vocabulary import read_sample, train_tokenizer

    path = Path(config.to) / "tokenizer.json"
    if path.exists():
        raise ValueError(f"to={config.to} must have no tokenizer.json yet: it would be another one for what it made")
    texts = read_sample(find_sources(config.corpus), config.field, config.held_out, config.megabytes * 1e6)
    size = train_tokenizer(texts, config.vocab_size, path)
    print(f"{path} has {size:,} tokens; data.tokenizer={config.to} model.vocab_size={-(-size // 64) * 64}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["tokenizer", *sys.argv[1:]]))
