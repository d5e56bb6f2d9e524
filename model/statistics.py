"""How evenly a model uses its experts, read off the counts that come with every loss.

    load [L, E]         tokens that expert e of routed layer l received: ``Losses.load``, summed over what is measured
    mean                a layer's load summed over its experts, / E
    maximal violation   max_e load / mean - 1    0: perfectly even;  E / K - 1: the same K experts took every token
    dead                experts without a single token

The maximal violation is that of auxiliary-loss-free balancing (MaxVio in arXiv 2408.15664). Counts of several
micro-batches, ranks or steps are added before they are measured: the violation of a sum is not the sum of violations.
Shapes: L routed layers (those of multi-token prediction last), E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Balance(NamedTuple):
    """Balance of every layer, in the order of ``Losses.load``. A layer without tokens counts as even."""

    max_violation: Tensor  # [L] float64: max / mean - 1
    dead: Tensor  # [L] int64: experts without a token, in layers that had tokens

    def worst_violation(self) -> float:
        """The largest violation of any layer; 0 for a model without routed layers."""
        return float(self.max_violation.max()) if len(self.max_violation) else 0.0

    def dead_experts(self) -> int:
        """Experts without a token, over all layers."""
        return int(self.dead.sum())


def measure_balance(load: Tensor) -> Balance:
    """Counts [L, E] of tokens per expert -> the balance of each layer. A dense model's [0, 0] has no layers."""
    if not load.numel():
        return Balance(torch.zeros(len(load), dtype=torch.float64), torch.zeros(len(load), dtype=torch.int64))
    used = load.sum(dim=1) > 0
    mean = load.double().mean(dim=1)
    violation = torch.where(used, load.amax(dim=1) / mean - 1, 0.0)
    return Balance(violation, ((load == 0).sum(dim=1)) * used)
