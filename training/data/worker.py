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
from contextlib import suppress
from pathlib import Path

import numpy as np

from training.data.listing import SPLITS, ShardPlan
from training.data.malformed import Malformed, keep_malformed
from training.data.middle import encode
from training.data.texts import Piece, Setup, gather, read_pieces
from training.data.tokenizer import Tokenizer, load_tokenizer, pick_dtype
from training.data.tokens import UNCOUNTED, Shard, ShardWriter


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


def send(**message: object) -> None:
    """One line to the process that asked; unbuffered, so that nothing is left to write when that has gone."""
    os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def make_shard(setup: Setup, plan: ShardPlan, tokenizer: Tokenizer) -> Shard:
    """Tokenises the shard that ``plan`` describes into the folder; holds a few MB of text at a time."""
    text_bytes = replaced = 0
    malformed: list[Malformed] = []
    path = Path(setup.folder) / plan.file
    with ShardWriter(path, pick_dtype(tokenizer.vocab_size, setup.chat is not None)) as writer:
        for batch in gather(read_pieces(setup, plan, malformed)):
            write_batch(writer, batch, tokenizer, setup.fim if plan.split == SPLITS[0] else 0.0)
            text_bytes += sum(len(piece.text.encode()) for piece in batch)
            replaced += sum(piece.text.count("\ufffd") for piece in batch)
            send(bytes=sum(piece.read for piece in batch))
        keep_malformed(path, malformed)
        return writer.finish(text_bytes, replaced)


def write_batch(writer: ShardWriter, batch: list[Piece], tokenizer: Tokenizer, fim: float = 0.0) -> None:
    """Tokenises ``batch`` and appends it, each document followed by eos. A document without a token is no document."""
    rows, starts, position = [], [], 0
    eos = np.array([tokenizer.eos], writer.dtype)
    for piece, tokens in zip(batch, encode(batch, tokenizer, fim), strict=True):
        if piece.begins and piece.ends and not len(tokens):
            continue
        if piece.begins:
            starts.append(position)
        rows.append(tokens)
        position += len(tokens)
        if piece.ends:
            rows.append(eos if not piece.parts or piece.parts[-1].counted else eos | UNCOUNTED)
            position += 1
    writer.append(np.concatenate(rows) if rows else np.zeros(0, writer.dtype), starts)


if __name__ == "__main__":
    main()
