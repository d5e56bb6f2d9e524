"""One optimizer step over a global batch.

    plan micro-batches -> count denominators -> forward and backward of each
                       -> norm, clip, update -> router biases -> a row of the record

The loss is the sum over the tokens of the whole global batch divided by their number, so how the batch is cut into
micro-batches changes nothing but the order of sums.
"""

import math
from collections.abc import Callable, Sequence
from time import monotonic
from typing import NamedTuple

from torch import Tensor

from model.batch import Batch, Denominators, Losses, count_labels
from model.statistics import measure_balance
from training.determinism import measure_peak_memory
from training.evaluate import move
from training.metrics import StepRow
from training.rates import rate
from training.setup import Setup


class Totals(NamedTuple):
    """Sums over the micro-batches of a step."""

    losses: Tensor  # [1 + D] cross entropy in nats
    aux: Tensor  # auxiliary loss over sequences and layers
    load: Tensor  # [routed layers, E] tokens per expert


def run_step(setup: Setup, step: int, stop: Callable[[], bool]) -> StepRow | None:
    """Takes step ``step``. Returns None, and leaves everything as it was, if ``stop`` says so between micro-batches."""
    started, config = monotonic(), setup.config
    plan = setup.schedule.plan(step, config.run.micro_batch)
    batches = [move(setup.text.train.read(first, count), setup.device) for first, count in plan]
    denominators = count_denominators(batches, config.model.mtp.depth)
    setup.optimizer.begin()
    totals = accumulate(setup.model, batches, denominators, stop)
    if totals is None:
        return None
    losses = [loss / count for loss, count in zip(totals.losses.tolist(), denominators.tokens, strict=True)]
    lr = rate(config.optimizer, step, config.run.steps, setup.schedule)
    update = setup.optimizer.step(lr, finite=all(map(math.isfinite, losses)))
    if update.applied:
        setup.model.update_biases(totals.load, config.model.moe.bias_speed)
    balance = measure_balance(totals.load)
    tokens = setup.schedule.size(step) * config.data.sequence_length
    seconds = monotonic() - started
    return StepRow(
        step=step,
        loss=losses[0],
        mtp_losses=tuple(losses[1:]),
        aux=totals.aux.item() / denominators.sequences,
        lr=lr,
        grad_norm=update.norm,
        clip_factor=update.factor,
        tokens=tokens,
        cursor=setup.schedule.before(step + 1),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        violation_worst=balance.worst_violation(),
        violation_mean=balance.max_violation.mean().item() if len(balance.max_violation) else 0.0,
        dead_experts=balance.dead_experts(),
        skipped=not update.applied,
        peak_memory=measure_peak_memory(setup.device),
    )


def count_denominators(batches: Sequence[Batch], depth: int) -> Denominators:
    """What the sums of a global batch are divided by; 1 where nothing counts, so that nothing becomes 0 / 0."""
    counts = [sum(column) for column in zip(*(count_labels(batch, depth) for batch in batches), strict=True)]
    sequences = sum(len(batch.ids) for batch in batches)
    return Denominators(tuple(float(max(1, count)) for count in counts), float(sequences))


def accumulate(
    forward: Callable[[Batch, Denominators], Losses],
    batches: Sequence[Batch],
    denominators: Denominators,
    stop: Callable[[], bool],
) -> Totals | None:
    """Runs every micro-batch forward and backward and returns the sums, or None once ``stop`` says so."""
    totals = None
    for batch in batches:
        if stop():
            return None
        losses = forward(batch, denominators)
        losses.total.backward()
        here = Totals(losses.sums, losses.aux, losses.load)
        totals = here if totals is None else Totals(*(a + b for a, b in zip(totals, here, strict=True)))
    return totals
