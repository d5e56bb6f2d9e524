"""What is proved: a layout, a model, and batches that leave no fault a place to hide.

    sequence 0 mod 4   every label counts
             1 mod 4   none does
             2 mod 4   only labels in the first half do: with tp, a rank's whole shard is padding
             3 mod 4   some do

so that micro-batches, data-parallel ranks and shards of a sequence all differ in how much they count.
Shapes: N sequences a step, S tokens a sequence, D depth of multi-token prediction.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import Batch
from model.config import ModelConfig
from model.transformer import Transformer
from parallel.topology import Topology
from training.config import OptimizerConfig


@dataclass(frozen=True, slots=True)
class Case:
    """One proof. The model is small: every rank computes the plain run for itself."""

    topology: Topology
    model: ModelConfig
    optimizer: OptimizerConfig
    engine: str = "native"
    micro_batch: int = 1  # sequences a rank reads at once
    accumulation: int = 2  # micro-batches a step
    length: int = 8  # S
    documents: bool = True  # tokens attend within documents
    crowded: bool = False  # every token goes to the first experts; the others get none
    steps: int = 3
    seed: int = 0

    @property
    def sequences(self) -> int:
        """Sequences of a step, N."""
        return self.topology.dp * self.micro_batch * self.accumulation


def draw_batch(case: Case, step: int) -> Batch:
    """The global batch of a step: ids [N, S + 1 + D]."""
    generator = torch.Generator().manual_seed(1000 * case.seed + step)
    size = (case.sequences, case.length + 1 + case.model.mtp.depth)
    ids = torch.randint(case.model.vocab_size, size, generator=generator)
    counted = torch.rand(size, generator=generator) < 0.6
    counted[0::4] = True
    counted[1::4] = False
    counted[2::4] = torch.arange(size[1]) <= case.length // 2
    starts = torch.rand((case.sequences, case.length), generator=generator) < 0.3
    return Batch(ids, counted, starts.cumsum(1).int() if case.documents else None)


@torch.no_grad()
def disturb(case: Case, model: Transformer) -> None:
    """Makes every parameter of a fresh plain model show in its loss: norms leave one, selection biases leave zero."""
    generator = torch.Generator().manual_seed(case.seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.dim() == 1:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor += (0.2 * noise).to(tensor.dtype)
    if case.crowded:
        for router in model.routers():
            # Scores lie between 0 and 1: these experts come first, whatever the token.
            router.bias[: case.model.moe.top_k] += 10


def list_tensors(model: Transformer) -> dict[str, Tensor]:
    """Every parameter and buffer by its global name, detached."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
