"""A process that tokenises shards: ``python -m training.data.worker``.

It reads lines of JSON and writes lines of JSON, so it shares no memory, no imports and no start method with the
process that asked, and it ends when that process does:

    <- {folder, roots, tokenizer, eos, sha256, ...}  once: what ``Setup`` has
    <- {split, number, width, row, position}         a shard to make
    -> {bytes}                                       text tokenised since the last line
    -> {shard: [file, tokens, ...]}                  the shard is committed
    -> {error}                                       a mistake that the user can mend
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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
from training.data.malformed import Malformed, keep_malformed
from training.data.records import Bad, read_records
from training.data.tokenizer import Tokenizer, load_tokenizer, pick_dtype
from training.data.tokens import Shard, ShardWriter

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


class Piece(NamedTuple):
    """A text to tokenise, and whether its document begins and ends in it."""

    text: str
    begins: bool
    ends: bool
    read: int = 0  # bytes of files that were read for it and for what came before it


def main() -> None:
    """Makes shards until its input ends, or until nobody listens any more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    try:
        serve(Setup(**json.loads(sys.stdin.readline())))
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, OSError) as error:
        with suppress(BrokenPipeError):
            send(error=str(error))


def serve(setup: Setup) -> None:
    """Makes the shards that standard input asks for."""
    tokenizer = load_tokenizer(setup.tokenizer, setup.eos)
    if tokenizer.sha256 != setup.sha256:
        raise ValueError(f"data.tokenizer={tokenizer.name} changed while text was being tokenised")
    for line in sys.stdin:
        send(shard=make_shard(setup, ShardPlan(**json.loads(line)), tokenizer))


def send(**message: Any) -> None:
    """One line to the process that asked; unbuffered, so that nothing is left to write when that has gone."""
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def make_shard(setup: Setup, plan: ShardPlan, tokenizer: Tokenizer) -> Shard:
    """Tokenises the shard that ``plan`` describes into the folder; holds a few MB of text at a time."""
    text_bytes = replaced = 0
    malformed: list[Malformed] = []
    path = Path(setup.folder) / plan.file
    with ShardWriter(path, pick_dtype(tokenizer.vocab_size)) as writer:
        for batch in gather(read_pieces(setup, plan, malformed)):
            write_batch(writer, batch, tokenizer)
            text_bytes += sum(len(piece.text.encode()) for piece in batch)
            replaced += sum(piece.text.count("\ufffd") for piece in batch)
            send(bytes=sum(piece.read for piece in batch))
        keep_malformed(path, malformed)
        return writer.finish(text_bytes, replaced)


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
    for found in read_records(path, piece, setup.field):
        if isinstance(found, Bad):
            if setup.malformed == "fail":
                raise ValueError(f"{path}:{found.line}: {found.why}; data.malformed=skip leaves such records out")
            if split == SPLITS[0]:  # both read it
                malformed.append(Malformed(str(path), *found))
        elif is_held_out(found.encode(), setup.held_out) == (split != SPLITS[0]):
            yield from split_text(found)
    yield Piece("", False, False, len(piece))


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


def write_batch(writer: ShardWriter, batch: list[Piece], tokenizer: Tokenizer) -> None:
    """Tokenises ``batch`` and appends it, each document followed by eos. A document without a token is no document."""
    rows, starts, position = [], [], 0
    eos = np.array([tokenizer.eos], writer.dtype)
    for piece, tokens in zip(batch, tokenizer.encode_batch([p.text for p in batch]), strict=True):
        if piece.begins and piece.ends and not len(tokens):
            continue
        if piece.begins:
            starts.append(position)
        rows.append(tokens)
        position += len(tokens)
        if piece.ends:
            rows.append(eos)
            position += 1
    writer.append(np.concatenate(rows) if rows else np.zeros(0, writer.dtype), starts)


if __name__ == "__main__":
    main()
