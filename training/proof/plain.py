"""The reference: a case's steps on the plain model, each global batch in one forward, with torch's own AdamW."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.batch import Batch, Denominators, count_labels
from model.build import build
from training.config import OptimizerConfig
from training.engine import Update
from training.optimizer import match
from training.proof.case import Case, disturb, draw_batch
from training.proof.company import join_companies
from training.proof.trace import Step, Trace, copy_tensors, name_choices, take_gradient, vary_rate, watch_routers


class Reference(NamedTuple):
    """The plain run."""

    trace: Trace
    start: dict[str, Tensor]  # the disturbed weights that every layout starts from


def trace_plain(case: Case) -> Reference:
    """Takes the case's steps on the plain model, with torch's AdamW."""
    model, config = build(case.model, torch.float64, "cpu", case.seed, case.recipe), case.optimizer
    if case.recipe is not None:
        join_companies(case, model)
    initial = copy_tensors([model])
    disturb(case, model)
    start, parameters = copy_tensors([model]), dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        group_parameters(parameters, config), config.lr, (config.beta1, config.beta2), config.eps
    )
    steps: list[Step] = []
    first: Trace | None = None
    for step in range(case.steps):
        batch = draw_batch(case, step)
        with watch_routers(model) as seen:
            losses = model(batch, count_denominators(batch, case.model.mtp.depth))
        losses.total.backward()
        taken = {name: take_gradient(parameter) for name, parameter in parameters.items()}
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in taken.values()))
        factor = config.clip / norm if 0 < config.clip < norm else 1.0
        for name, parameter in parameters.items():
            parameter.grad = taken[name] * factor
        for group in optimizer.param_groups:
            group["lr"] = vary_rate(case, step)
        optimizer.step()
        optimizer.zero_grad()
        model.update_biases(losses.load, case.model.moe.bias_speed)
        steps.append(Step(losses.sums, losses.aux, losses.load, Update(norm, factor, True)))
        if first is None:
            once, choices = torch.ones(case.sequences, dtype=torch.int64), name_choices(model, seen, 0, case.sequences)
            first = Trace(initial, once, choices, losses.total.detach(), taken, [], steps, {})
    assert first is not None
    return Reference(first._replace(final=copy_tensors([model])), start)


def group_parameters(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[dict[str, Any]]:
    """Those that decay and those that do not, as torch's optimizers take them."""
    kept = match(config.no_decay, parameters)
    return [
        {"params": [p for n, p in parameters.items() if n not in kept], "weight_decay": config.weight_decay},
        {"params": [p for n, p in parameters.items() if n in kept], "weight_decay": 0.0},
    ]


def count_denominators(batch: Batch, depth: int) -> Denominators:
    """Counted labels at each depth, and sequences."""
    return Denominators(tuple(map(float, count_labels(batch, depth))), float(len(batch.ids)))
