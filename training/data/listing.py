"""The documents of a corpus as files on disk, and how they are dealt out to shards.

A listing is one line of JSON a document, one file a split. Its digest, over paths, sizes and times of writing, is the
identity of the text: cheap enough to take at every start, and it changes with any file.

    bytes of a split, end to end     |doc 0|doc 1  |     doc 2          |...
    pieces (of one document)         |  0  |  0    | 0    | 1    | 2    |       at most PIECE bytes each
    shards                           |        0         |      1        |       by where a piece begins

A document up to PIECE bytes is tokenised whole; a longer one piece by piece, cut at line breaks, so no text is too
long for memory, and many processes share one file. Which piece falls where is arithmetic on sizes alone. So it is for
files of records; one that can only be read from end to end is one piece (training/data/records.py).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

from training.data.corpus import PACKED, Document, Source, cut, list_documents

PIECE = 1 << 18  # bytes of text tokenised at once: a tokenizer holds up to 200 times that
NARROWEST = 1 << 20  # bytes of text in a shard, at least
SPLITS = ("train", "held_out")
STREAMS = (*PACKED, ".arrow")  # files that are read from end to end


class Survey(NamedTuple):
    """What a corpus amounts to."""

    digest: str
    documents: dict[str, int]  # per split; a file of records is one
    size: dict[str, int]  # bytes of text per split
    records: int  # files of them


class ShardPlan(NamedTuple):
    """Which pieces a shard holds: those that begin in bytes ``number * width`` to ``(number + 1) * width`` of a
    split.

    ``row`` and ``position`` say where to start reading: the byte of the listing at which the line of the first such
    piece's document begins, and the byte of the split at which that document begins.
    """

    split: str
    number: int
    width: int
    row: int
    position: int

    @property
    def file(self) -> str:
        """The name of its token file."""
        return f"{self.split}-{self.number:05d}.tokens"


def take_survey(sources: tuple[Source, ...], held_out: float) -> Survey:
    """Walks the corpus and counts."""
    return _survey(sources, held_out, {})


def take_listings(sources: tuple[Source, ...], held_out: float, folder: Path, expected: Survey) -> None:
    """Walks the corpus again and writes its listings to ``folder``, unless they are there.

    Raises:
        ValueError: the corpus is no longer what ``expected`` says.
    """
    paths = {split: listing_path(folder, split) for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return
    with ExitStack() as stack:
        partial = {split: path.with_name(f"{path.name}.partial") for split, path in paths.items()}
        files = {split: stack.enter_context(path.open("wb")) for split, path in partial.items()}
        found = _survey(sources, held_out, files)
    if found != expected:
        raise ValueError("data.corpus changed while it was being listed: prepare again")
    for split in SPLITS:
        partial[split].rename(paths[split])


def listing_path(folder: Path, split: str) -> Path:
    """Where the listing of a split lies."""
    return folder / f"{split}.documents.jsonl"


def _survey(sources: tuple[Source, ...], held_out: float, files: Mapping[str, IO[bytes]]) -> Survey:
    digest = blake2b(digest_size=16)
    documents, size, records = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), 0
    for split, document in list_documents(sources, held_out):
        row = document.to_row()
        digest.update(split.encode() + row)
        documents[split] += 1
        records += document.has_records and split == SPLITS[0]
        size[split] += document.stop - document.start
        if files:
            files[split].write(row)
    return Survey(digest.hexdigest(), documents, size, records)


def choose_width(size: int) -> int:
    """Bytes of text a shard: at most 256 shards while they are below a GiB each, never less than a MiB."""
    return min(max(NARROWEST, -(-size // 256)), 1 << 30)


def plan_shards(folder: Path, split: str, width: int) -> Iterator[ShardPlan]:
    """The shards of a split, in order, from its listing."""
    position = row = 0
    following = 0  # number of the next shard
    with listing_path(folder, split).open("rb") as listing:
        for line in listing:
            document = Document.from_row(line)
            last = position + (count_pieces(document) - 1) * PIECE
            for number in range(max(following, position // width), last // width + 1):
                yield ShardPlan(split, number, width, row, position)
                following = number + 1
            position += document.stop - document.start
            row += len(line)


def list_pieces(folder: Path, plan: ShardPlan) -> Iterator[tuple[Document, int]]:
    """The pieces of a shard in order: (document, number of the piece)."""
    position = plan.position
    with listing_path(folder, plan.split).open("rb") as listing:
        listing.seek(plan.row)
        for line in listing:
            document = Document.from_row(line)
            first = max(0, -(-(plan.number * plan.width - position) // PIECE))
            for piece in range(first, count_pieces(document)):
                if position + piece * PIECE >= (plan.number + 1) * plan.width:
                    return
                yield document, piece
            position += document.stop - document.start


def count_pieces(document: Document) -> int:
    """How many pieces a document is tokenised in."""
    return 1 if document.path.endswith(STREAMS) else -(-(document.stop - document.start) // PIECE)


def find_piece(document: Document, piece: int) -> range:
    """The bytes of a piece."""
    if count_pieces(document) == 1:
        return range(document.start, document.stop)
    begin = document.start + piece * PIECE
    return range(begin, min(begin + PIECE, document.stop))


def check_unchanged(path: Path, status: os.stat_result, document: Document) -> None:
    """Raises ValueError where the file is not what the listing says: it changed in between."""
    if (status.st_size, status.st_mtime_ns) != (document.size, document.mtime):
        raise ValueError(f"{path} changed while it was being tokenised: prepare again")


def read_piece(file: IO[bytes], document: Document, piece: int) -> str:
    """The text of a piece. Bytes that are not UTF-8 become U+FFFD, a byte-order mark at a file's start is dropped.

    Raises:
        ValueError: the file is not what the listing says: it changed in between.
    """
    check_unchanged(Path(file.name), os.fstat(file.fileno()), document)
    begin, end = (
        cut(file.fileno(), document.start + number * PIECE, document.start, document.stop)
        for number in (piece, piece + 1)
    )
    file.seek(begin)
    text = file.read(end - begin)
    if begin == 0:
        text = text.removeprefix(b"\xef\xbb\xbf")
    return text.decode("utf-8", "replace")
