"""What a run is, in words and numbers: how it stands, the last values of its record, what ran and with which keys."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from launcher.page import html
from launcher.page.gather import Run
from launcher.page.read import number
from launcher.page.scale import write_bytes, write_loss, write_number, write_prefix
from training.clock import write_time
from training.ledger import SECOND, sum_parts, write_hours

RECENT = 200  # steps that the speed is told of


def write_head(run: Run) -> str:
    """What it is, how it stands, and its figures."""
    config, start = run.config, run.record.start
    name = f" ({config.run.name})" if config.run.name not in run.path.name else ""
    what = [config.model.name, str(config.precision)]
    if start:
        ranks = number(start.get("ranks"))
        what.insert(1, f"{write_prefix(number(start.get('parameters')))} parameters")
        what += [f"{ranks:,.0f} ranks" if ranks > 1 else "one rank", str(start.get("device", ""))]
    return (
        f"<h1>{html.escape(run.path.name + name)}</h1>"
        + html.write_text(f"{run.word}: {', '.join(filter(None, what))}", "soft")
        + html.write_text(run.died, "bad")
        + html.write_tiles(_list_tiles(run))
    )


def _list_tiles(run: Run) -> Iterator[tuple[str, str, str]]:
    record, steps = run.record, run.config.run.steps
    done = int(record.steps[-1]) if len(record.steps) else 0
    yield "steps", f"{done:,}", f"of {steps:,} ({done / steps:.0%})"
    yield "loss", write_loss(record.last("loss")), "nats a token, last step"
    if record.held_out:
        step, loss = record.held_out[-1]
        bigram = number(record.ending.get("bigram"))
        words = f"after step {step:,}" if math.isnan(bigram) else f"a bigram model: {bigram:.4f}"
        yield "held-out loss", write_loss(loss), words
    yield "tokens", write_prefix(float(np.nansum(record.series["tokens"]))), "in these steps"
    pace = record.series["tokens_per_second"][-RECENT:]
    pace = pace[np.isfinite(pace)]
    yield (
        "tokens a second",
        write_prefix(float(np.median(pace)) if len(pace) else math.nan),
        f"median of {len(pace)} steps",
    )
    yield "peak memory", write_bytes(record.last("peak_memory")), "of rank 0"
    if run.attempts:
        spent = sum_parts(run.attempts).values()
        wall = sum(attempt.end - attempt.begin for attempt in run.attempts) / SECOND
        several = f"{len(run.attempts)} attempts, " if len(run.attempts) > 1 else ""
        yield "time", write_time(wall), several + write_hours(sum(each.hours for each in spent))
        if money := sum(each.money for each in spent):
            yield "cost", f"{money:,.2f}", "of all devices"


def write_values(run: Run) -> str:
    """The curves in numbers."""
    series, names = (
        run.record.series,
        {
            "loss": "loss, nats a token",
            "lr": "learning rate",
            "grad_norm": "gradient norm",
            "tokens_per_second": "tokens a second",
            "seconds": "seconds a step",
            "peak_memory": "peak memory of rank 0",
        },
    )
    if run.config.model.routed_blocks():
        names |= {
            "violation_worst": "maximal violation, worst layer",
            "violation_mean": "maximal violation, mean of layers",
            "dead_experts": "dead experts",
        }
    rows = []
    for name, words in names.items():
        values = series[name][np.isfinite(series[name])]
        if len(values):
            write = {"peak_memory": write_bytes, "loss": write_loss}.get(name, write_number)
            figures = (values[-1], values[-100:].mean(), values.min(), values.max())
            rows.append((words, *(write(float(each)) for each in figures)))
    if run.record.held_out:
        losses = [loss for _, loss in run.record.held_out]
        figures = (losses[-1], math.nan, min(losses), max(losses))
        rows.append(("held-out loss, nats a token", *map(write_loss, figures)))
    head = ("", "last", "mean of the last 100", "least", "most")
    return html.write_section("Last values", html.write_table(head, rows, "Values of the record") if rows else "")


def write_facts(run: Run) -> str:
    """What ran, on what, how it was called, and all of its configuration."""
    command = html.write_verbatim(run.command, "command") if run.command else ""
    sample = html.write_fold("A sample of its text", html.write_verbatim(run.sample, "sample")) if run.sample else ""
    rows = list(_flatten(asdict(run.config)))
    keys = html.write_table(("key", "value"), rows, "Its configuration", words=(0, 1))
    fold = html.write_fold(f"All {len(rows)} keys of its configuration", keys)
    facts = ((name, value) for name, value in _list_facts(run) if value)
    return html.write_section("What ran", html.write_facts(facts), command, sample, fold)


def _list_facts(run: Run) -> Iterator[tuple[str, str]]:
    config, start, p = run.config, run.record.start, run.config.parallel
    yield "model", config.model.name
    yield "batch", f"{config.run.global_batch:,} sequences of {config.data.sequence_length:,} tokens"
    yield "text", ", ".join(config.data.mixture or config.data.corpus)
    ranks = number(start.get("ranks"))
    dp = f"{ranks // (p.pp * p.cp * p.tp):.0f}" if ranks > 0 else "?" if p.dp is None else str(p.dp)
    yield "layout", f"pp={p.pp} dp={dp} cp={p.cp} tp={p.tp} ep={p.ep}, engine {p.engine}"
    for name in ("device", "threads", "torch"):
        yield name, str(start.get(name, ""))
    yield "compiled", {True: "yes", False: "no"}.get(start.get("compiled", ""), "")
    yield "data", str(start.get("data", ""))[:12]
    yield "python", str(run.versions.get("python", ""))
    yield "platform", str(run.versions.get("platform", ""))
    git = run.versions.get("git")
    if isinstance(git, dict):
        yield "revision", str(git.get("revision", ""))[:12] + (", changed" if git.get("dirty") else "")
    yield "proof", ", ".join(f"{key} {value}" for key, value in run.proof.items())


def _flatten(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "null" if value is None else str(value)
