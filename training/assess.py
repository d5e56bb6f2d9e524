"""Kept weights on named texts, in any layout: no optimizer and no gradient, every rank with its own part alone.

    a checkpoint, or a run's last weights --> this rank's stages, a slice of a tensor at a time
    text --> tokens --> training/evaluate.py --> nats a token --> bits a byte

    bits a byte = nats a token / ln 2 * tokens / bytes of UTF-8        (Gao et al., The Pile, 2101.00027, section 3.1)

Tokens and bytes are those of the whole text, the ends of documents among the tokens: where a part is measured, this is
what the whole has if it is like that part. Unlike the loss of a token it can be compared between tokenizers.
"""

import math
from typing import Any, NamedTuple

import torch

from configs.schema import TrainConfig
from parallel.mesh import Mesh
from training.data.prepare import Report
from training.evaluate import Evaluator, count_sequences
from training.machine import prepare_machine
from training.pipeline import make_runner
from training.sets import open_shared_sets
from training.source import Kept, open_kept
from training.weights import Stages, load_parts


class Score(NamedTuple):
    """What came of a text."""

    loss: float  # nats a token
    bits_per_byte: float | None  # None where nobody knows the bytes
    labels: int  # that were measured
    tokens: int  # of the whole text


class Forward:
    """An engine that has nothing to do but forwards: see ``training.work.Forwards``."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def forward(self, stage: int, *args: Any) -> Any:
        """Calls the module of ``stage``."""
        return self._stages[stage](*args)


@torch.no_grad()
def assess(
    mesh: Mesh, config: TrainConfig, kept: Kept, sets: dict[str, str], tokens: int, report: Report
) -> dict[str, Score]:
    """The scores of the weights ``kept`` on each of ``sets``, texts by name: the same on every rank. Collective.

    Without ``sets``, on what ``config.data`` holds out. About so many ``tokens`` of each are read; 0: all. Precision
    and layout are those of ``config``. Raises ValueError as ``prepare_machine``, ``open_kept`` and ``open_sets``.
    """
    machine = prepare_machine(config, mesh)
    texts = open_shared_sets(config, sets, report, mesh)
    runner = make_runner(config, mesh)
    stages = load_parts(config, mesh, runner.pipeline, open_kept(kept, config))
    report(f"{config.model.name} in {config.precision} on {machine.describe()}")
    evaluator = Evaluator(runner, Forward(stages), mesh, config.model.mtp.depth, config.run.micro_batch)
    scores = {}
    for name, text in texts.items():
        wanted = count_sequences(text.sequences, tokens) if tokens else text.sequences.sequences
        found = evaluator.measure(text.sequences, wanted)
        bits = found.loss / math.log(2) * text.tokens / text.size if text.size else None
        scores[name] = Score(found.loss, bits, found.labels, text.tokens)
    return scores
