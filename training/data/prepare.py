"""Text to token files, once: ``prepare`` finds them, has them made or finished, checks and opens them.

    data.corpus, data.tokenizer, data.held_out -> identity -> <data.folder>/<corpus>-<tokenizer>-<digest>/
        train.documents.jsonl, held_out.documents.jsonl      which texts: training/data/listing.py
        train-00000.tokens, ..., held_out-00000.tokens, ...  training/data/tokens.py
        journal.jsonl                                        while it is being made: training/data/job.py
        index.json                                           written last: training/data/index.py

The identity holds the digests of the listing and of the tokenizer, so a changed text or a changed tokenizer has
another folder: neither is ever taken for what it was. No torch is loaded.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from training.data.config import DataConfig, name_field
from training.data.corpus import find_sources
from training.data.index import NAME, digest, read_index, verify
from training.data.job import Job, Report, is_complete, make
from training.data.listing import PIECE, SPLITS, take_survey
from training.data.malformed import describe_malformed
from training.data.megatron import is_megatron, open_megatron
from training.data.tokenizer import USUAL_FIM, Tokenizer, load_tokenizer
from training.data.tokens import Row, Shard


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token files, verified and open."""

    folder: Path
    digest: str  # names the data in a run's record
    tokenizer: Tokenizer
    train: Row
    held_out: Row
    shards: dict[str, list[Shard]]  # of each split; none of files that somebody else made
    verified: int  # bytes whose checksums were read


def prepare(config: DataConfig, report: Report = print, thorough: bool = False) -> Prepared:
    """The token files that ``config`` asks for, made first where they are not there yet.

    ``thorough`` checks every checksum, else as many as data.verify_gigabytes allows; sizes are always checked.
    ``report`` gets lines to print.

    Raises:
        ValueError: a mistake in ``config``, a text that changed on the way, or a damaged file, by name.
    """
    tokenizer = load_tokenizer(config.tokenizer, config.eos)
    if any(map(is_megatron, config.corpus)):
        return _open_theirs(config, tokenizer, thorough)
    folder = _find_prepared(config, tokenizer)
    if folder is None:
        try:
            folder = _make(config, tokenizer, report)
        except OSError as error:  # a text that may not be read, a folder that may not be written, a full disk
            raise ValueError(f"data.corpus={','.join(config.corpus)} in data.folder={config.folder}: {error}") from None
    index = read_index(folder)
    verified = verify(folder, index, float("inf") if thorough else config.verify_gigabytes * 1e9)
    train, held_out = (index.open(folder, split) for split in SPLITS)
    return Prepared(folder, index.digest, tokenizer, train, held_out, index.splits, verified)


def _open_theirs(config: DataConfig, tokenizer: Tokenizer, thorough: bool) -> Prepared:
    """data.corpus may be token files that Megatron made."""
    name = config.corpus[0]
    if len(config.corpus) > 1:
        raise ValueError(
            f"data.corpus={','.join(config.corpus)} must be one pair of Megatron's files; several are a data.mixture"
        )
    if config.chat is not None or config.fim:
        raise ValueError(f"data.chat={config.chat} and data.fim={config.fim} need text: {name} is tokens already")
    splits, digest = open_megatron(name, config.held_out, tokenizer.eos)
    most = float("inf") if thorough else config.verify_gigabytes * 1e9 / len(SPLITS)
    verified = sum(split.check(tokenizer.vocab_size, most) for split in splits.values())
    return Prepared(Path(name).parent, digest, tokenizer, splits["train"], splits["held_out"], {}, verified)


def _find_prepared(config: DataConfig, tokenizer: Tokenizer) -> Path | None:
    """data.corpus may be a folder that ``prepare`` made: the text itself need not be there any more."""
    folder = Path(config.corpus[0]).expanduser()
    if len(config.corpus) > 1 or not (folder / NAME).is_file():
        return None
    identity = read_index(folder).identity
    if identity["tokenizer"] != _identify(tokenizer):
        raise ValueError(
            f"data.tokenizer={config.tokenizer}, but data.corpus={folder} was prepared with another, "
            f"{identity['tokenizer']['name']} (sha256 {identity['tokenizer']['sha256'][:12]})"
        )
    was = {"held_out": identity["held_out"], "fim": identity.get("fim", 0.0), "chat": identity.get("chat")}
    for key, value in was.items():
        if (asked := getattr(config, key)) != value:
            raise ValueError(f"data.{key}={asked}, but data.corpus={folder} was prepared with {value}")
    return folder


def _make(config: DataConfig, tokenizer: Tokenizer, report: Report) -> Path:
    job = _plan_job(config, tokenizer)
    if not is_complete(job.folder):
        _notice_change(job, report)
        try:
            make(job, config.workers, report)
        finally:
            for line in describe_malformed(job.folder):
                report(line)
    return job.folder


def _plan_job(config: DataConfig, tokenizer: Tokenizer) -> Job:
    if config.fim and tokenizer.fim is None:
        raise ValueError(
            f"data.fim={config.fim} needs three tokens, and data.tokenizer={config.tokenizer} has none of the usual: "
            + "; ".join(" ".join(names) for names in USUAL_FIM)
        )
    sources = find_sources(config.corpus)
    survey = take_survey(sources, config.held_out)
    if config.chat is not None and survey.documents[SPLITS[0]] != survey.records:
        raise ValueError(f"data.chat={config.chat} needs records of conversations, and data.corpus has other texts too")
    for split in SPLITS[1:] if config.held_out == 1 else SPLITS:
        if not survey.documents[split]:
            raise ValueError(
                f"data.held_out={config.held_out} leaves {split} empty: {sum(survey.documents.values())} text files in "
                f"data.corpus={','.join(config.corpus)}, held out by whole files. Name more text, a larger share, or a "
                "single file, which is cut in two"
            )
    identity = {
        "corpus": {"digest": survey.digest, "documents": survey.documents, "size": survey.size},
        "held_out": config.held_out,
        "piece": PIECE,
        "tokenizer": _identify(tokenizer),
        **({"field": name_field(config)} if survey.records else {}),
        **({"chat": config.chat.value} if config.chat is not None else {}),
        **({"fim": config.fim} if config.fim else {}),
    }
    words = (Path(config.corpus[0]).stem, Path(tokenizer.name).stem, digest(identity)[:12])
    slug = "-".join(re.sub(r"\W+", "_", word) for word in words)
    folder = Path(config.folder) / slug
    return Job(sources, survey, tokenizer, config.eos, name_field(config), config.malformed.value, identity, folder)


def _identify(tokenizer: Tokenizer) -> dict[str, str]:
    return {"name": Path(tokenizer.name).name, "sha256": tokenizer.sha256}


def _notice_change(job: Job, report: Report) -> None:
    """Says so where the same sources were prepared before with the same settings, and have changed since."""
    for path in sorted(job.folder.parent.glob(f"*/{NAME}")):
        try:
            before = read_index(path.parent)
        except ValueError:
            continue
        if before.sources != [str(source.root) for source in job.sources] or path.parent == job.folder:
            continue
        changed = [key for key in job.identity if job.identity[key] != before.identity.get(key)]
        names = {identity["tokenizer"]["name"] for identity in (before.identity, job.identity)}
        if changed == ["corpus"] or (changed == ["tokenizer"] and len(names) == 1):
            report(f"data.{changed[0]} has changed since {path.parent} was prepared: it is made anew beside it")
