"""Loss on held-out text: the mean cross entropy of the next token, on the same labels every time.

About ``run.eval_tokens`` tokens are read from the start of the split's shuffled order, which depends on no seed
of the run and on no layout. Every forward has the training shape, so that compiled segments meet no new one, and every
rank runs equally many: sequences past the last that is wanted fill up and count nowhere.
"""

import torch
from torch import Tensor

from model.batch import Batch, count_labels
from parallel.doing import doing
from parallel.topology import Axis
from training.agree import sum_over
from training.setup import Setup


def count_sequences(setup: Setup) -> int:
    """Sequences an evaluation reads, none twice."""
    held_out = setup.text.held_out
    return max(1, min(setup.config.run.eval_tokens // held_out.sequence_length, held_out.sequences))


@doing("evaluation")
def evaluate(setup: Setup) -> float:
    """Mean cross entropy of the held-out split in nats a token: the same number on every rank. Collective."""
    # Compiled segments are compiled for a backward that may follow; without gradients they would be compiled anew.
    with torch.set_grad_enabled(setup.machine.compiled):
        total, labels = _measure(setup)
    counted = int(sum_over(labels, setup.mesh, Axis.dp))
    return sum_over(total, setup.mesh).item() / max(1, counted)


def _measure(setup: Setup) -> tuple[Tensor, Tensor]:
    """This rank's share of the sum of losses, and the labels of its sequences."""
    mesh, depth, size = setup.mesh, setup.config.model.mtp.depth, setup.config.run.micro_batch
    batches, labels, wanted = [], 0, count_sequences(setup)
    for first in range(0, wanted, size * mesh.degree(Axis.dp)):
        at = first + size * mesh.coordinate(Axis.dp)
        batch = setup.text.held_out.read(at, size)
        batch.counted[max(0, wanted - at) :] = False
        labels += count_labels(batch, depth)[0]
        batches.append(move(batch, mesh.device))
    return setup.runner.evaluate(setup.engine, batches)[0], torch.tensor(labels, device=mesh.device)


def move(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``."""

    def send(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(send(batch.ids), send(batch.counted), None if batch.documents is None else send(batch.documents))
