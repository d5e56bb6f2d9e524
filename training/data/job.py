"""Making a folder of token files: whoever is killed anywhere leaves what the next one continues from.

    lock -> listings -> plan -> shards (worker processes; a line in the journal for each) -> index, journal removed

Each step ends in a rename or in a whole line, and each file is a pure function of the text and the tokenizer, so the
folder comes out the same to the byte however often it was interrupted.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from training.data import journal, progress
from training.data.corpus import Source
from training.data.index import NAME, Index, read_index, write_index
from training.data.listing import SPLITS, ShardPlan, Survey, choose_width, plan_shards, take_listings
from training.data.pool import make_shards
from training.data.tokenizer import Tokenizer, pick_dtype
from training.data.tokens import Shard

Report = Callable[[str], None]


class Job(NamedTuple):
    """What is to be made, from what, and where."""

    sources: tuple[Source, ...]
    survey: Survey
    tokenizer: Tokenizer
    eos: str | None  # data.eos
    field: str  # data.field
    malformed: str  # data.malformed
    identity: dict[str, Any]  # of the index
    folder: Path


def is_complete(folder: Path) -> bool:
    """Whether there is an index and every file that it names, whatever is in them."""
    if not (folder / NAME).is_file() or (folder / journal.NAME).exists():
        return False
    return all((folder / shard.file).exists() for rows in read_index(folder).splits.values() for shard in rows)


def make(job: Job, workers: int | None, report: Report) -> None:
    """Makes or finishes ``job.folder`` by so many processes; two that want the same one take turns.

    Raises:
        ValueError: a text changed on the way, or a shard made again differs from the one that the index describes.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    with _lock(job.folder, report):
        if is_complete(job.folder):
            return
        for leftover in job.folder.glob("*.partial"):
            leftover.unlink()
        take_listings(job.sources, job.identity["held_out"], job.folder, job.survey)
        plans = [
            plan for split in SPLITS for plan in plan_shards(job.folder, split, choose_width(job.survey.size[split]))
        ]
        shards = _finish_shards(job, plans, workers, report)
        _commit(job, {split: [shards[plan.file] for plan in plans if plan.split == split] for split in SPLITS})


@contextmanager
def _lock(folder: Path, report: Report) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _finish_shards(job: Job, plans: list[ShardPlan], workers: int | None, report: Report) -> dict[str, Shard]:
    """Makes the shards that are not there yet; returns all of them by file name."""
    rows = journal.read_journal(job.folder)
    if (job.folder / NAME).exists():
        rows += [shard for shards in read_index(job.folder).splits.values() for shard in shards]
    present = journal.keep_present(rows, job.folder, _dtype(job).itemsize)
    setup = {
        "folder": str(job.folder),
        "roots": [str(source.root) for source in job.sources],
        "tokenizer": job.tokenizer.name,
        "eos": job.eos,
        "sha256": job.tokenizer.sha256,
        "held_out": job.identity["held_out"],
        "field": job.field,
        "malformed": job.malformed,
        "fim": job.identity.get("fim", 0.0),
        "chat": job.identity.get("chat"),
    }
    left = [plan for plan in plans if plan.file not in present]
    total = sum(job.survey.size.values())
    done = sum(shard.text_bytes for shard in present.values())
    with (
        (job.folder / journal.NAME).open("a") as record,
        progress.show("tokenising", done, total, report) as advance,
        closing(make_shards(setup, left, workers)) as messages,
    ):
        for message in messages:
            advance(message.get("bytes", 0))
            if "shard" in message:
                shard = Shard(*message["shard"])
                present[shard.file] = shard
                journal.write_row(shard, record)
    return present


def _dtype(job: Job) -> Any:
    return pick_dtype(job.tokenizer.vocab_size, "chat" in job.identity)


def _commit(job: Job, splits: dict[str, list[Shard]]) -> None:
    wanted = SPLITS[job.identity["held_out"] == 1]
    if not any(shard.tokens for shard in splits[wanted]):
        raise ValueError(f"data.corpus has no text to {'train on' if wanted == SPLITS[0] else 'measure'}")
    index = Index(
        sources=[str(source.root) for source in job.sources],
        identity=job.identity,
        dtype=_dtype(job).str,
        eos=job.tokenizer.eos,
        splits=splits,
    )
    if not (job.folder / NAME).exists():
        write_index(job.folder, index)
    elif read_index(job.folder) != index:
        raise ValueError(
            f"{job.folder}: what was made anew differs from what was there (another version "
            "of the tokenizers library?): delete the folder and prepare again"
        )
    (job.folder / journal.NAME).unlink()
