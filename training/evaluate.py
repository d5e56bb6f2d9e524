"""Loss on held-out text: the mean cross entropy of the next token, on the same labels every time.

About ``run.eval_tokens`` tokens are read from the start of the split's shuffled order, which depends on no seed
of the run, in micro-batches of the training shape, so that compiled segments meet no new one.
"""

import torch
from torch import Tensor

from model.batch import Batch, Denominators, count_labels
from training.setup import Setup


def count_sequences(setup: Setup) -> int:
    """Sequences an evaluation reads: whole micro-batches, no sequence twice unless the split is shorter than one."""
    run = setup.config.run
    wanted = min(run.eval_tokens // setup.text.held_out.sequence_length, setup.text.held_out.sequences)
    return max(1, wanted // run.micro_batch) * run.micro_batch


def evaluate(setup: Setup) -> float:
    """Mean cross entropy of the held-out split in nats a token."""
    # Compiled segments are compiled for a backward that may follow; without gradients they would be compiled anew.
    with torch.set_grad_enabled(setup.compiled):
        return _measure(setup)


def _measure(setup: Setup) -> float:
    depth, size = setup.config.model.mtp.depth, setup.config.run.micro_batch
    # What a loss would be divided by for a backward: the sums that are read here come undivided.
    denominators = Denominators((1.0,) * (1 + depth), 1.0)
    total, labels = torch.zeros((), dtype=torch.float64, device=setup.device), 0
    for first in range(0, count_sequences(setup), size):
        batch = move(setup.text.held_out.read(first, size), setup.device)
        labels += count_labels(batch, depth)[0]
        total += setup.model(batch, denominators).sums[0]
    return total.item() / max(1, labels)


def move(batch: Batch, device: torch.device) -> Batch:
    """``batch`` on ``device``."""

    def send(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(send(batch.ids), send(batch.counted), None if batch.documents is None else send(batch.documents))
