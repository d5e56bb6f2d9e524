"""Cross entropy of a head whose vocabulary is split over tp: no rank ever sees a token's full logits.

    m = max over ranks of max_v l_v        z = sum over ranks of sum_v exp(l_v - m)        loss = log z + m - l[label]

Every rank computes all tokens against its own rows of the head; maxima, sums and the label's logit are agreed by two
small all-reduces. The value a rank returns covers the tokens of its own sequence shard, so that the ranks' values add
up to the loss; its gradients cover all tokens. Tokens go in chunks and logits are computed twice, as in model/loss.py.
Shapes: hidden [T, H] of the whole sequences, weight [V / n, H], labels and counted [T].
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from model.loss import Targets, differentiate, split_chunks, widen
from model.product import matmul
from model.sequence import Sequence
from parallel.collectives import all_reduce


class Part(NamedTuple):
    """What a rank has of the vocabulary."""

    first: int  # its first row
    group: dist.ProcessGroup

    def find(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Which labels lie in this part's ``rows``, and where (0 for the others)."""
        local = labels - self.first
        mine = (local >= 0) & (local < rows)
        return mine, local.where(mine, 0)


class VocabularyCrossEntropyFunction(torch.autograd.Function):
    """masks [2, T]: the tokens that the gradients are of, and those of them that the value is the sum over."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, masks: Tensor, part: Part) -> Tensor:  # type: ignore[no-untyped-def]
        wide = widen(hidden.dtype)
        normaliser = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start, end in split_chunks(len(hidden), len(weight)):
            logits = matmul(hidden[start:end], weight.t()).to(wide)
            top = all_reduce(logits.amax(-1), part.group, dist.ReduceOp.MAX).wait()
            mine, local = part.find(labels[start:end], len(weight))
            label = logits.gather(-1, local[:, None])[:, 0] * mine
            sums = all_reduce(torch.stack(((logits - top[:, None]).exp().sum(-1), label)), part.group).wait()
            normaliser[start:end] = sums[0].log() + top
            total += ((normaliser[start:end] - sums[1]) * masks[1, start:end]).sum()
        ctx.save_for_backward(hidden, weight, labels, masks[0], normaliser)
        ctx.part = part
        return total

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        hidden, weight, labels, counted, normaliser = ctx.saved_tensors
        held, rows = ctx.part.find(labels, len(weight))
        return *differentiate(hidden, weight, Targets(rows, held, counted * g), normaliser), None, None, None


class VocabularyCrossEntropy:
    """``model.loss.CrossEntropy`` of hidden shards [B, S / n, H] and labels of whole sequences [B, S]."""

    def __init__(self, part: Part, sequence: Sequence) -> None:
        self.part, self.sequence = part, sequence

    def __call__(self, hidden: Tensor, weight: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        (whole,) = self.sequence.gather(hidden)
        length, place = hidden.shape[1], self.part.group.rank()
        reported = torch.zeros_like(counted)
        reported[:, place * length : (place + 1) * length] = True
        masks = torch.stack((counted, counted & reported)).flatten(1)
        return VocabularyCrossEntropyFunction.apply(whole.flatten(0, 1), weight, labels.flatten(), masks, self.part)
