"""A tokenizer of one's own text: byte-level BPE (arXiv 1508.07909), trained by Hugging Face's ``tokenizers``.

    data.corpus --every n-th piece, up to so many bytes--> words and how often --> merges --> tokenizer.json

Words are split as GPT-4's and DeepSeek's are: letters, numbers of three digits at most, signs, line ends. Of the text
only the words are in memory. What is held out is not looked at. The same text gives the same file.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from training.data.corpus import Source, is_held_out, list_documents
from training.data.listing import SPLITS, count_pieces, find_piece, read_piece, take_survey
from training.data.records import read_records
from training.data.tokenizer import USUAL_EOS, USUAL_FIM

WORDS = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
EOS = USUAL_EOS[0]
SPECIAL = (EOS, *USUAL_FIM[0])


def train_tokenizer(texts: Iterator[str], vocab_size: int, path: Path) -> int:
    """Writes ``path``, a tokenizer.json, and what names its end of text beside it. How many tokens it has."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": EOS}) + "\n")
    return int(tokenizer.get_vocab_size())


def read_sample(sources: tuple[Source, ...], field: str, held_out: float, most: float) -> Iterator[str]:
    """Texts to train on: all where they are at most ``most`` bytes, else pieces spread evenly over them."""
    size = take_survey(sources, held_out).size[SPLITS[0]]
    stride, number = max(1, -(-size // max(1, int(most)))), 0
    for split, document in list_documents(sources, held_out):
        if split != SPLITS[0]:
            continue
        path = document.locate(sources[document.source].root)
        for piece in range(count_pieces(document)):
            number += 1
            if number % stride:
                continue
            if document.has_records:
                found = read_records(path, find_piece(document, piece), field)
                texts = (each for each in found if isinstance(each, str))
                yield from (text for text in texts if not is_held_out(text.encode(), held_out))
            else:
                with path.open("rb") as file:
                    yield read_piece(file, document, piece)
