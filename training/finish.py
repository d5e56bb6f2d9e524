"""The end of a run: what to compare its loss with, a sample of its text, and where everything is."""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from parallel.doing import doing
from training import ledger as ledgers
from training import view
from training.data import bigram
from training.evaluate import count_sequences
from training.generate import continue_text, show_controls
from training.metrics import Record, StepRow
from training.setup import Setup
from training.whole import find_whole


class Ending(StrEnum):
    """Why a run took no further step."""

    finished = "finished"
    interrupted = "interrupted"  # by Ctrl-C
    diverged = "diverged"  # optimizer.skip_limit


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the steps led to."""

    ending: Ending
    steps: int  # taken, those before the run was resumed included
    last: StepRow | None  # the last step taken since then
    held_out: float  # the last evaluation, nats a token; NaN before the first


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A run in numbers. Losses are nats a token, NaN where they were not measured."""

    ending: Ending
    steps: int  # taken
    loss: float  # of the last step
    held_out: float
    bigram: float  # of a bigram model on the labels of held_out
    seconds: float
    cost: float


@doing("finishing")
def finish(setup: Setup, record: Record, outcome: Outcome, gauge: view.Gauge, ledger: ledgers.Ledger) -> Summary:
    """Writes ``sample.txt`` and the record's last row, and prints the summary: all of it on rank 0 alone."""
    first, folder = setup.mesh.rank == 0, ledger.run
    complete = first and outcome.ending is Ending.finished
    text = write_sample(setup, folder) if complete and setup.config.run.sample.tokens else ""
    bigram_loss = measure_bigram(setup) if complete else math.nan
    ledger.close(outcome.ending)
    summary = Summary(
        ending=outcome.ending,
        steps=outcome.steps,
        loss=outcome.last.loss if outcome.last else math.nan,
        held_out=outcome.held_out,
        bigram=bigram_loss,
        seconds=gauge.elapsed(),
        cost=ledger.count_cost(),
    )
    record.write("end", **asdict(summary))
    if text:
        print(f"\n--- sample ---\n{show_controls(text)}\n--------------\n")
    if first:
        print("\n".join([*describe(summary, setup, folder), *ledger.describe()]), flush=True)
    return summary


def measure_bigram(setup: Setup) -> float:
    """The loss of a bigram model on the labels that ``evaluate`` reads; NaN of a mixture, and for a table too large."""
    vocabulary, row = setup.text.tokenizer.vocab_size, setup.text.row
    if vocabulary > bigram.LARGEST or row is None:
        return math.nan
    held_out = setup.text.held_out
    return bigram.bigram_loss(row, held_out, vocabulary, count_sequences(held_out, setup.config.run.eval_tokens))


def write_sample(setup: Setup, folder: Path) -> str:
    """Lets the model continue ``run.sample.prompt``; "" where there is no whole model to ask. On rank 0 alone."""
    try:
        model = find_whole(setup, folder / "weights")
    except ValueError as reason:
        print(f"no sample: {reason}")
        return ""
    sampling = setup.config.run.sample
    # The cache grows with every token: compiled segments would be compiled anew for each.
    with setup.machine.eagerly():
        text = sampling.prompt + "".join(continue_text(model, setup.text.tokenizer, sampling))
    (folder / "sample.txt").write_text(text, encoding="utf-8")
    return text


def describe(summary: Summary, setup: Setup, folder: Path) -> list[str]:
    """The summary in lines."""
    run = setup.config.run
    lines = [f"{summary.ending} after {summary.steps} of {run.steps} steps in {view.write_time(summary.seconds)}"]
    if summary.ending is Ending.diverged:
        limit = setup.config.optimizer.skip_limit
        lines.append(
            f"loss or gradient were not finite in more than optimizer.skip_limit={limit} steps in a row; the weights "
            "are those before. Try a lower optimizer.lr or a longer optimizer.rate.warmup_steps"
        )
    if not math.isnan(summary.held_out):
        against = "" if math.isnan(summary.bigram) else f"   (a bigram model: {summary.bigram:.4f})"
        lines.append(f"held-out loss {summary.held_out:.4f} nats a token{against}")
    names = {"weights": "weights", "metrics": "metrics.jsonl", "sample": "sample.txt"}
    names |= {"schedule": "schedule.svg", "config": "config.yaml"}
    lines += [f"{what:<8} {folder / name}" for what, name in names.items() if (folder / name).exists()]
    return lines
