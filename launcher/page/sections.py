"""The parts of a run's page, in the order in which they are read: HTML, or "" where a run has nothing for one."""

import math

import numpy as np

from launcher.page import html
from launcher.page.bars import draw_ledger
from launcher.page.curves import make_frame, write_balance, write_curves
from launcher.page.facts import write_facts, write_head, write_values
from launcher.page.gather import Run
from launcher.page.read import Record, number
from launcher.page.scale import write_bytes, write_loss, write_number
from launcher.page.thin import COLUMNS

LISTED = 40  # lines of what happened
HAPPENED = {
    "retry": "step {} was taken again, and was finite then",
    "checkpoint_failed": "a checkpoint after step {} could not be written",
    "skipped": "{} skipped: loss or gradient were not finite",
    "resume": "went on with step {}",
}


def write_run(run: Run) -> str:
    """The page."""
    frame = make_frame(run)
    parts = [
        write_head(run),
        write_curves(run, frame),
        write_balance(run, frame),
        write_evaluations(run),
        html.write_section("Where the time and the money went", draw_ledger(run.attempts)),
        write_schedule(run),
        write_happenings(run.record),
        write_values(run),
        write_facts(run),
        write_foot(run),
    ]
    return html.write_page(f"{run.path.name} – Shoestring", parts)


def write_evaluations(run: Run) -> str:
    """What ``shoestring eval`` has measured."""
    rows = [
        (name, kind, write_number(step), write_loss(loss), write_loss(bits), write_number(tokens))
        for name, kind, step, loss, bits, tokens in run.evaluations
    ]
    head = ("evaluation", "set", "step", "loss, nats a token", "bits a byte", "tokens measured")
    table = html.write_table(head, rows, "Losses on other sets", words=(0, 1)) if rows else ""
    numbers = [
        (name, task, write_number(step), metric, write_loss(value)) for name, task, step, metric, value in run.answers
    ]
    columns = ("evaluation", "task", "step", "number", "value")
    answers = html.write_table(columns, numbers, "Tasks of lm-eval's harness", words=(0, 1, 3)) if numbers else ""
    return html.write_section("Evaluations", table, answers)


def write_schedule(run: Run) -> str:
    """The picture that the run has drawn of its pipeline."""
    if not run.schedule_size:
        return ""
    name, stages, batches = (str(run.record.start.get(key, "?")) for key in ("schedule", "stages", "micro_batches"))
    bubble = number(run.record.start.get("bubble"))
    words = f"{name}: {stages} stages, {batches} micro-batches"
    words += "" if math.isnan(bubble) else f", bubble {bubble:.1%} of a step, as simulated"
    picture = (
        html.write_picture(run.schedule, f"Schedule {words}")
        if run.schedule
        else html.write_text(
            f"Its picture, schedule.svg, is too large for this page: {write_bytes(run.schedule_size)}."
        )
    )
    return html.write_section("Schedule", html.write_text(words), picture)


def write_happenings(record: Record) -> str:
    """Restarts, steps taken again or skipped, checkpoints that failed."""
    skipped = record.steps[record.series["skipped"] > 0].astype(int)
    runs = np.split(skipped, np.flatnonzero(np.diff(skipped) > 1) + 1) if len(skipped) else []
    found = [(int(each[0]), HAPPENED["skipped"].format(_write_range(int(each[0]), int(each[-1])))) for each in runs]
    found += [(step, HAPPENED["resume"].format(f"{step:,}")) for step in record.resumed]
    found += [(event.step, HAPPENED[event.kind].format(f"{event.step:,}")) for event in record.events]
    rows = [(f"{step:,}", words) for step, words in sorted(found)[-LISTED:]]
    said = []
    if record.checkpoints:
        said.append(f"{len(record.checkpoints):,} checkpoints, the last after step {record.checkpoints[-1]:,}.")
    if len(skipped):
        said.append(f"{len(skipped):,} of {len(record.steps):,} steps were skipped.")
    if len(found) > LISTED:
        said.append(f"Of {len(found):,} events the last {LISTED}:")
    table = html.write_table(("step", "what"), rows, "Restarts and faults", words=(0, 1)) if rows else ""
    return html.write_section("What happened", html.write_text(" ".join(said)), table)


def write_foot(run: Run) -> str:
    """What the pictures leave out."""
    said = ["Steps are counted from 1."]
    if len(run.record.steps) > 2 * COLUMNS:
        said.append(
            f"Curves of {len(run.record.steps):,} steps show the least and the largest in each of {COLUMNS} columns."
        )
    if run.record.left_out:
        said.append(f"{run.record.left_out:,} lines of the record could not be read.")
    said.append(f"Written by shoestring report from {run.path}.")
    return f"<footer>{html.escape(' '.join(said))}</footer>"


def _write_range(first: int, last: int) -> str:
    return f"step {first:,} was" if first == last else f"steps {first:,} to {last:,} were"
