"""Loss on held-out text: the mean cross entropy of the next token, on the same labels every time.

So many tokens are read from the start of the text's shuffled order, which depends on no seed of the run and on no
layout. Every forward has the training shape, so that compiled segments meet no new one, and every rank runs equally
many: sequences past the last that is wanted fill up and count nowhere.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Batch, count_labels
from parallel.doing import doing
from parallel.mesh import Mesh
from parallel.topology import Axis
from training.agree import sum_over
from training.data.mixture import Sequences
from training.pipeline import Runner
from training.setup import Setup
from training.work import Forwards

PART = 1024  # micro-batches of a replica that are in memory at once


class Measured(NamedTuple):
    """What came of it: the same on every rank."""

    nats: float  # sum of cross entropy
    labels: int

    @property
    def loss(self) -> float:
        """Nats a label."""
        return self.nats / max(1, self.labels)


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Forwards of a model that is spread over ranks."""

    runner: Runner
    engine: Forwards
    mesh: Mesh
    depth: int  # of multi-token prediction
    micro_batch: int

    def measure(self, text: Sequences, wanted: int) -> Measured:
        """The first ``wanted`` sequences of ``text``. Collective."""
        nats = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        labels = torch.zeros((), dtype=torch.int64, device=self.mesh.device)
        width = PART * self.micro_batch * self.mesh.degree(Axis.dp)
        for first in range(0, wanted, width):
            some, counted = self._measure(text, range(first, min(wanted, first + width)))
            nats += some
            labels += counted
        counted = int(sum_over(labels, self.mesh, Axis.dp))
        return Measured(sum_over(nats, self.mesh).item(), counted)

    def _measure(self, text: Sequences, wanted: range) -> tuple[Tensor, int]:
        """This rank's share of the sum of losses, and the labels of its sequences."""
        batches, labels, size = [], 0, self.micro_batch
        for first in range(wanted.start, wanted.stop, size * self.mesh.degree(Axis.dp)):
            at = first + size * self.mesh.coordinate(Axis.dp)
            batch = text.read(at, size)
            batch.counted[max(0, wanted.stop - at) :] = False
            labels += count_labels(batch, self.depth)[0]
            batches.append(move(batch, self.mesh.device))
        return self.runner.evaluate(self.engine, batches)[0], labels


def count_sequences(text: Sequences, tokens: int) -> int:
    """Sequences of ``text`` that an evaluation of about so many tokens reads, none twice."""
    return max(1, min(tokens // text.sequence_length, text.sequences))


@doing("evaluation")
def evaluate(setup: Setup) -> float:
    """Mean cross entropy of the held-out split in nats a token: the same number on every rank. Collective."""
    run, text = setup.config.run, setup.text.held_out
    evaluator = Evaluator(setup.runner, setup.engine, setup.mesh, setup.config.model.mtp.depth, run.micro_batch)
    # Compiled segments are compiled for a backward that may follow; without gradients they would be compiled anew.
    with torch.set_grad_enabled(setup.machine.compiled):
        return evaluator.measure(text, count_sequences(text, run.eval_tokens)).loss


def move(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``."""

    def send(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(send(batch.ids), send(batch.counted), None if batch.documents is None else send(batch.documents))
