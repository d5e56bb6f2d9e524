"""One optimizer step over a global batch.

    plan micro-batches -> agree on denominators -> forward and backward of each -> sum gradients and statistics
                       -> norm, clip, update -> router biases -> a row of the record

The loss is the sum over the tokens of the whole global batch divided by their number, so how the batch is cut into
micro-batches and spread over ranks changes nothing but the order of sums.
"""

import math
from collections.abc import Callable
from time import monotonic

from model.statistics import measure_balance
from parallel.doing import doing
from parallel.exchange import take_travelled
from parallel.topology import Axis
from training.determinism import measure_peak_memory
from training.evaluate import move
from training.metrics import StepRow, shows_load
from training.microbatches import count_denominators, total_over_ranks, total_travel
from training.rates import rate
from training.setup import Setup


def do_nothing() -> None:
    """What prepares nothing."""


@doing("step {step}", 1)
def run_step(
    setup: Setup, step: int, stop: Callable[[], bool], prepare: Callable[[], None] = do_nothing
) -> StepRow | None:
    """Takes step ``step``. Collective over all ranks. ``prepare`` is called just before state changes.

    Returns None, and leaves everything as it was, if ``stop`` says so between micro-batches: on all ranks or on none.
    A step whose loss or gradient is not finite leaves everything as it was, too.
    """
    started, config, mesh = monotonic(), setup.config, setup.mesh
    plan = setup.schedule.plan(step, config.run.micro_batch, mesh.degree(Axis.dp), mesh.coordinate(Axis.dp))
    batches = [move(setup.text.train.read(first, count), mesh.device) for first, count in plan]
    denominators = count_denominators(batches, config.model.mtp.depth, mesh)
    take_travelled(setup.stages.values(), mesh)  # what evaluations have moved
    setup.engine.begin()
    share = setup.runner.step(setup.engine, batches, denominators, stop)
    if share is None:
        return None
    totals = total_over_ranks(share, mesh)
    travel = total_travel(setup.stages.values(), mesh)
    losses = [loss / count for loss, count in zip(totals.losses.tolist(), denominators.tokens, strict=True)]
    lr = rate(config.optimizer, step, config.run.steps, setup.schedule)
    prepare()
    update = setup.engine.step(lr, finite=all(map(math.isfinite, losses)))
    if update.applied:
        setup.average.take()
        for stage in setup.stages.values():
            stage.update_biases(totals.load, config.model.moe.bias_speed)
    balance, moved = measure_balance(totals.load), setup.placer.take(totals.load) if update.applied else 0
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
        moved_experts=moved,
        nodes_touched=travel.mean_nodes(),
        bytes_inside=travel.inside,
        bytes_across=travel.across,
        skipped=not update.applied,
        peak_memory=measure_peak_memory(mesh.device),
        load=tuple(map(tuple, totals.load.tolist())) if shows_load(step, config.run.steps) else (),
    )
