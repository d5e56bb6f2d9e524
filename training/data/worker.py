"""A process that tokenises shards: ``python -m training.data.worker``.

It reads lines of JSON and writes lines of JSON, so it shares no memory, no imports and no start method with the
process that asked, and it ends when that process does:

    <- {folder, roots, tokenizer, eos, sha256}       once
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
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from training.data.listing import PIECE, ShardPlan, count_pieces, list_pieces, read_piece
from training.data.tokenizer import Tokenizer, load_tokenizer, pick_dtype
from training.data.tokens import Shard, ShardWriter

BATCH = 4096  # texts tokenised in one call, if they are small


class Piece(NamedTuple):
    """A text to tokenise, and whether its document begins and ends in it."""

    text: str
    begins: bool
    ends: bool


def main() -> None:
    """Makes shards until its input ends, or until nobody listens any more."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    try:
        serve(json.loads(sys.stdin.readline()))
    except BrokenPipeError:
        sys.exit(1)
    except (ValueError, OSError) as error:
        with suppress(BrokenPipeError):
            send(error=str(error))


def serve(setup: dict[str, Any]) -> None:
    """Makes the shards that standard input asks for."""
    tokenizer = load_tokenizer(setup["tokenizer"], setup["eos"])
    if tokenizer.sha256 != setup["sha256"]:
        raise ValueError(f"data.tokenizer={tokenizer.name} changed while text was being tokenised")
    for line in sys.stdin:
        shard = make_shard(Path(setup["folder"]), setup["roots"], ShardPlan(**json.loads(line)), tokenizer)
        send(shard=shard)


def send(**message: Any) -> None:
    """One line to the process that asked; unbuffered, so that nothing is left to write when that has gone."""
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def make_shard(folder: Path, roots: list[str], plan: ShardPlan, tokenizer: Tokenizer) -> Shard:
    """Tokenises the shard that ``plan`` describes into ``folder``; holds a few MB of text at a time."""
    text_bytes = replaced = 0
    with ShardWriter(folder / plan.file, pick_dtype(tokenizer.vocab_size)) as writer:
        for batch in gather(read_pieces(folder, roots, plan)):
            size = sum(len(piece.text.encode()) for piece in batch)
            write_batch(writer, batch, tokenizer)
            text_bytes += size
            replaced += sum(piece.text.count("\ufffd") for piece in batch)
            send(bytes=size)
        return writer.finish(text_bytes, replaced)


def read_pieces(folder: Path, roots: list[str], plan: ShardPlan) -> Iterator[Piece]:
    """The pieces of a shard, each file opened once."""
    current: tuple[int, str] | None = None
    file: IO[bytes] | None = None
    try:
        for document, number in list_pieces(folder, plan):
            if current != (document.source, document.path):
                if file:
                    file.close()
                file = (Path(roots[document.source]) / document.path).open("rb")
                current = (document.source, document.path)
            assert file
            last = number == count_pieces(document) - 1
            yield Piece(read_piece(file, document, number), number == 0, last)
    finally:
        if file:
            file.close()


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
