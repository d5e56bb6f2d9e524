"""The texts of a shard, read from the files of a corpus: whole, in pieces, or as records that belong to its split."""

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from training.data.chat import Message, Part, render, take_messages
from training.data.config import Chat
from training.data.corpus import WINDOW, Document, is_held_out
from training.data.listing import (
    PIECE,
    SPLITS,
    ShardPlan,
    check_unchanged,
    count_pieces,
    find_piece,
    list_pieces,
    read_piece,
)
from training.data.malformed import Malformed
from training.data.records import Bad, read_records, take_text

BATCH = 4096  # texts tokenised in one call, if they are small


class Setup(NamedTuple):
    """What is the same for all shards."""

    folder: str
    roots: list[str]
    tokenizer: str
    eos: str | None
    sha256: str
    held_out: float
    field: str  # of records
    malformed: str  # "skip" or "fail"
    fim: float  # share of the documents to train on that have their middle at the end
    chat: str | None  # records are conversations


class Piece(NamedTuple):
    """A text to tokenise, and whether its document begins and ends in it."""

    text: str
    begins: bool
    ends: bool
    read: int = 0  # bytes of files that were read for it and for what came before it
    parts: tuple[Part, ...] = ()  # of a conversation, whose text they are


def read_pieces(setup: Setup, plan: ShardPlan, malformed: list[Malformed]) -> Iterator[Piece]:
    """The pieces of a shard, each file opened once. Records that are none are added to ``malformed``."""
    for document, pieces in groupby(list_pieces(Path(setup.folder), plan), key=itemgetter(0)):
        path = document.locate(Path(setup.roots[document.source]))
        numbers = [number for _, number in pieces]
        if document.has_records:
            begin, end = (find_piece(document, number) for number in (numbers[0], numbers[-1]))
            yield from read_chosen(setup, plan.split, path, document, range(begin.start, end.stop), malformed)
            continue
        with path.open("rb") as file:
            for number in numbers:
                last = number == count_pieces(document) - 1
                text, read = read_piece(file, document, number), len(find_piece(document, number))
                yield Piece(text, number == 0, last, read)


def read_chosen(
    setup: Setup, split: str, path: Path, document: Document, piece: range, malformed: list[Malformed]
) -> Iterator[Piece]:
    """The records in bytes ``piece`` of a file that belong to ``split``."""
    check_unchanged(path, path.stat(), document)
    take = take_text if setup.chat is None else partial(take_messages, Chat(setup.chat))
    for found in read_records(path, piece, setup.field, take):
        if isinstance(found, Bad):
            if setup.malformed == "fail":
                raise ValueError(f"{path}:{found.line}: {found.why}; data.malformed=skip leaves such records out")
            if split == SPLITS[0]:  # both read it
                malformed.append(Malformed(str(path), *found))
        elif is_held_out(write_name(found), setup.held_out) == (split != SPLITS[0]):
            yield from split_text(found) if setup.chat is None else [make_conversation(found, Chat(setup.chat))]
    yield Piece("", False, False, len(piece))


def write_name(found: Any) -> bytes:
    """What says of a record on which side it is."""
    return found.encode() if isinstance(found, str) else repr(found).encode()


def make_conversation(messages: list[Message], chat: Chat) -> Piece:
    """A document of a conversation."""
    parts = tuple(render(messages, chat))
    return Piece("".join(part.text for part in parts), True, True, parts=parts)


def split_text(text: str) -> Iterator[Piece]:
    """A document in pieces of about PIECE characters, cut at line breaks where there are some."""
    start = 0
    while start < len(text):
        stop = start + PIECE
        if stop < len(text):
            stop = text.find("\n", stop, stop + WINDOW) + 1 or stop
        yield Piece(text[start:stop], start == 0, stop >= len(text))
        start = stop


def gather(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Pieces in batches of about PIECE characters."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE or len(batch) == BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
