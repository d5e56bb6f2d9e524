"""Fill-in-the-middle (arXiv 2207.14255): a part of the documents has its middle at its end, so that a model learns to
fill gaps. In the order prefix, suffix, middle, a tenth of them, as DeepSeek-V3 was trained (arXiv 2412.19437, 4.1):

    begin | prefix | hole | suffix | end | middle | eos           begin, hole and end are tokens of their own

Which documents, and where they are cut, follows from a hash of the text. Shapes: rows of tokens.
"""

from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from training.data.chat import Part
from training.data.texts import Piece
from training.data.tokenizer import Tokenizer, Tokens
from training.data.tokens import UNCOUNTED

FRACTION = 2.0**-64


def cut_middle(text: str, rate: float) -> tuple[str, str, str] | None:
    """Prefix, suffix and middle of a document that is among the share ``rate``; None: it stays as it is."""
    if not rate or not text:
        return None
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=24, person=b"middle").digest()
    chosen, *cuts = (int.from_bytes(digest[start : start + 8]) * FRACTION for start in (0, 8, 16))
    if chosen >= rate:
        return None
    first, last = sorted(int(cut * (len(text) + 1)) for cut in cuts)
    return text[:first], text[last:], text[first:last]


def encode(batch: list[Piece], tokenizer: Tokenizer, fim: float) -> Iterator[Tokens]:
    """The tokens of each piece; of a share ``fim`` of the documents that are one piece, with the middle at the end; of
    conversations with a bit for what counts not.
    """
    cuts = [cut_middle(piece.text, fim) if piece.begins and piece.ends else None for piece in batch]
    texts = [
        text
        for piece, cut in zip(batch, cuts, strict=True)
        for text in cut or [part.text for part in piece.parts if not part.mark] or (piece.text,)
    ]
    encoded = iter(tokenizer.encode_batch(texts))
    for piece, parts in zip(batch, cuts, strict=True):
        if piece.parts:
            yield _encode_parts(piece.parts, encoded, tokenizer)
            continue
        if parts is None:
            yield next(encoded)
            continue
        assert tokenizer.fim is not None
        pairs = zip(tokenizer.fim, (next(encoded) for _ in parts), strict=True)
        yield np.concatenate([np.concatenate(([token], row)) for token, row in pairs])


def _encode_parts(parts: tuple[Part, ...], encoded: Iterator[Tokens], tokenizer: Tokenizer) -> Tokens:
    """A conversation: its texts are the next of ``encoded``."""
    rows = []
    for part in parts:
        row = (tokenizer.encode_mark(part.text) if part.mark else next(encoded)).astype(np.uint32)
        rows.append(row if part.counted else row | np.uint32(UNCOUNTED))
    return np.concatenate(rows)
