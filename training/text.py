"""The text of a run: its tokenizer and its two splits, packed into sequences."""

from dataclasses import dataclass, replace

from configs.schema import TrainConfig
from parallel.mesh import Mesh
from training.agree import wait_for_all
from training.data.batches import Batches
from training.data.config import parse_weights
from training.data.mixture import Mixture, Sequences
from training.data.packing import WholeDocuments
from training.data.prepare import Report, digest, prepare
from training.data.tokenizer import Tokenizer, check_vocabulary
from training.data.tokens import Row
from training.ramp import schedule_batches


@dataclass(frozen=True, slots=True)
class Text:
    """What a model is trained on and measured with."""

    tokenizer: Tokenizer
    train: Sequences  # shuffled
    held_out: Sequences  # shuffled too, so that the first few sequences are a fair sample of all files
    digest: str  # names the data in the record
    row: Row | None = None  # what ``train`` is made of, but of a mixture


def open_text(config: TrainConfig, report: Report) -> Text:
    """Prepares the text where it is not yet, and opens it.

    Raises ValueError for damaged token files and for a tokenizer with more tokens than the model.
    """
    if config.data.mixture:
        return _mix(config, report)
    data = prepare(config.data, report)
    check_vocabulary(data.tokenizer, config.model.vocab_size)
    train = _pack_train(config, data.train, report, "")
    # Its order has a seed of its own: runs with different seeds are measured on the same labels.
    held_out = pack(config, data.held_out, seed=0)
    return Text(data.tokenizer, train, held_out, data.digest, data.train)


def open_shared_text(config: TrainConfig, report: Report, mesh: Mesh) -> Text:
    """``open_text`` on every rank: rank 0 prepares and checks, then the others open what it made. Collective."""
    text = open_text(config, report) if mesh.rank == 0 else None
    wait_for_all(mesh)
    return text or open_text(replace(config, data=replace(config.data, verify_gigabytes=0.0)), report)


def _mix(config: TrainConfig, report: Report) -> Text:
    """``open_text`` of several corpora. What is held out is mixed as the run ends."""
    weights = parse_weights(config.data.mixture)
    parts = {name: prepare(replace(config.data, corpus=(name,), mixture={}), report) for name in weights}
    tokenizer = next(iter(parts.values())).tokenizer
    check_vocabulary(tokenizer, config.model.vocab_size)
    total = schedule_batches(config.run, config.data.sequence_length).before(config.run.steps)
    texts = [_pack_train(config, part.train, report, f" of {name}") for name, part in parts.items()]
    train = Mixture(texts, [*weights.values()], total, config.data.seed)
    for name, words in zip(parts, train.describe(total), strict=True):
        report(f"of the run {words} are {name}")
    ends = [[(0.0, knots[-1][1])] for knots in weights.values()]
    count = config.run.eval_tokens // config.data.sequence_length
    held_out = Mixture([pack(config, part.held_out, 0) for part in parts.values()], ends, count, 0)
    return Text(tokenizer, train, held_out, digest([[part.digest for part in parts.values()], [*weights.items()]]))


def _pack_train(config: TrainConfig, tokens: Row, report: Report, whose: str) -> Sequences:
    """What is trained on, with a word about conversations that do not fit."""
    train = pack(config, tokens, config.data.seed)
    if isinstance(train, WholeDocuments) and train.cut:
        count = f"{train.cut:,} of {tokens.documents:,} conversations{whose}"
        report(f"{count} are longer than data.sequence_length, and cut")
    return train


def pack(config: TrainConfig, tokens: Row, seed: int) -> Sequences:
    """``tokens`` as sequences in the order of ``seed``. ValueError where there are too few."""
    length, lookahead = config.data.sequence_length, 1 + config.model.mtp.depth
    if config.data.chat is not None:
        whole = WholeDocuments(tokens, sequence_length=length, lookahead=lookahead, seed=seed)
        if whole.cut == tokens.documents:
            raise ValueError(f"data.sequence_length={length} is shorter than every conversation: raise it")
        return whole
    return Batches(
        tokens,
        sequence_length=length,
        lookahead=lookahead,
        seed=seed,
        mask_documents=config.data.mask_documents,
        shuffle=True,
    )
