"""Text to token numbers and back: bytes as they are, or any Hugging Face ``tokenizer.json``.

    bytes    id = byte, 0..255;  256 ends a document;  257..259 are for fill-in-the-middle, the rest spare: 33 * 8 ids

A document's text is never read as control tokens: "<|endoftext|>" inside a file stays the characters it is.
"""

import json
import os
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

BYTES = "bytes"
# Names by which published tokenizers call the token that ends a text, where no tokenizer_config.json says it.
USUAL_EOS = ("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>", "<|eos|>")
# And those of fill-in-the-middle: before the prefix, the suffix and the middle.
USUAL_FIM = (
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)

Tokens = NDArray[Any]  # [tokens], uint16 or uint32: ``pick_dtype``


class Tokenizer(Protocol):
    """What training needs of a tokenizer."""

    name: str
    sha256: str  # of what defines it; two tokenizers with the same digest give the same tokens
    vocab_size: int  # ids are below it
    eos: int  # ends every document
    fim: tuple[int, int, int] | None  # begin, hole and end of fill-in-the-middle: training/data/middle.py

    def encode(self, text: str) -> Tokens:
        """The tokens of ``text``, without ``eos``."""

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        """``encode`` of each text."""

    def encode_mark(self, text: str) -> Tokens:
        """The tokens of a mark between what speakers say, control tokens among them."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``; control tokens are dropped, broken UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """The bytes of the text in UTF-8."""

    name = BYTES
    sha256 = sha256(b"bytes: 256 ids, eos 256, vocabulary 264").hexdigest()
    vocab_size = 264
    eos = 256
    fim: tuple[int, int, int] | None = (257, 258, 259)

    def encode(self, text: str) -> Tokens:
        # A lone surrogate, which a terminal's arguments may hold, has no bytes in UTF-8.
        return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        return [self.encode(text) for text in texts]

    def encode_mark(self, text: str) -> Tokens:
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


class FileTokenizer:
    """A ``tokenizer.json`` of Hugging Face's ``tokenizers``, without special tokens, truncation or padding."""

    def __init__(self, path: Path, eos: str | None) -> None:
        from tokenizers import Tokenizer as HuggingFace

        content = path.read_bytes()
        try:
            self._inner = HuggingFace.from_str(content.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"data.tokenizer={path} is not a tokenizer.json: {error}") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.name = str(path)
        self.vocab_size = max(vocabulary.values()) + 1  # ids may have gaps
        self.eos = _find_eos(path, eos, vocabulary)
        self.fim = next((_find_all(names, vocabulary) for names in USUAL_FIM if set(names) <= vocabulary.keys()), None)
        self.sha256 = sha256(content + b"eos %d" % self.eos).hexdigest()
        self._dtype = pick_dtype(self.vocab_size)
        self._marks: dict[str, Tokens] = {}

    def encode(self, text: str) -> Tokens:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[Tokens]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def encode_mark(self, text: str) -> Tokens:
        if text not in self._marks:
            for name in re.findall(r"<[|｜].*?[|｜]>", text):
                if self._inner.token_to_id(name) is None:
                    raise ValueError(f"data.chat writes {name}, and data.tokenizer={self.name} has no such token")
            self._inner.encode_special_tokens = False
            self._marks[text] = np.array(self._inner.encode(text, add_special_tokens=False).ids, self._dtype)
            self._inner.encode_special_tokens = True
        return self._marks[text]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=True))


def load_tokenizer(name: str, eos: str | None = None) -> Tokenizer:
    """The tokenizer data.tokenizer names: "bytes", a ``tokenizer.json`` or a folder that holds one.

    ``eos`` is the text of the token that ends a document; None: what ``tokenizer_config.json`` beside the file says,
    or else a usual name.

    Raises:
        ValueError: no such file, not a tokenizer, or no token to end documents with.
    """
    if name == BYTES:
        if eos is not None:
            raise ValueError(f"data.eos={eos} cannot be set with data.tokenizer={BYTES}: it has its own, 256")
        return ByteTokenizer()
    path = Path(name).expanduser()
    if path.is_dir():
        path /= "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"data.tokenizer={name}: no such file, and not {BYTES!r}")
    return FileTokenizer(path, eos)


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int) -> None:
    """Raises ValueError where the tokenizer has ids that the model's embedding has no row for."""
    if tokenizer.vocab_size > model_vocab_size:
        raise ValueError(
            f"model.vocab_size={model_vocab_size} must be at least {tokenizer.vocab_size}, "
            f"the vocabulary of data.tokenizer={tokenizer.name}"
        )


def pick_dtype(vocab_size: int, flagged: bool = False) -> np.dtype[Any]:
    """The narrowest dtype, little-endian on every machine, that holds every id; ``flagged``: and a bit more."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 and not flagged else "<u4")


def _find_eos(path: Path, eos: str | None, vocabulary: dict[str, int]) -> int:
    if eos is None:
        said = _read_eos(path.with_name("tokenizer_config.json"))
        eos = next((token for token in (said, *USUAL_EOS) if token in vocabulary), None)
    if eos is None:
        raise ValueError(
            f"data.eos=null, but data.tokenizer={path} has none of the usual tokens to end a document with: "
            "set data.eos to one of its tokens"
        )
    if eos not in vocabulary:
        raise ValueError(f"data.eos={eos} is not a token of data.tokenizer={path}")
    return vocabulary[eos]


def _find_all(names: tuple[str, str, str], vocabulary: dict[str, int]) -> tuple[int, int, int]:
    first, second, third = names
    return vocabulary[first], vocabulary[second], vocabulary[third]


def _read_eos(path: os.PathLike[str]) -> str | None:
    """The ``eos_token`` of a tokenizer_config.json: a string, or an object with its text as ``content``."""
    try:
        token = json.loads(Path(path).read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token
