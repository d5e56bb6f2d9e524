"""The router: which experts a token visits, and with what weight (DeepSeek-V3, section 2.1.2).

    scores  s = sigmoid(x W^T) or softmax(x W^T)                     [T, E], at least float32
    choice  top_k of s + bias, within the top_groups groups whose two best sum highest
    gates   s of the chosen, normalised to 1 if asked, times gate_scale
    aux     sum_i f_i P_i per sequence, f_i = E / (K S) * count_i, P_i = mean over the sequence of s_i / sum_j s_j

The bias enters the choice only. After every optimizer step it moves against the load error of the whole global batch
(auxiliary-loss-free balancing, arXiv 2408.15664). Shapes: T = B * S tokens, E experts, K chosen.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.config import ModelConfig, MoEConfig, ScoreFunction
from model.device import kernel
from model.operator import operator, register_fake
from model.sequence import Sequence, WholeSequence


class Routing(NamedTuple):
    """Where the tokens of one micro-batch go in one layer."""

    experts: Tensor  # [T, K] int64
    gates: Tensor  # [T, K] float32 or wider
    aux: Tensor  # auxiliary loss summed over the sequences, before alpha
    load: Tensor  # [E] int64, tokens per expert


SCORES = {ScoreFunction.sigmoid: torch.sigmoid, ScoreFunction.softmax: lambda logits: logits.softmax(dim=-1)}


def _choose(scores: Tensor, groups: int, best: int, top_groups: int, top_k: int) -> Tensor:
    if groups > top_groups:
        grouped = scores.unflatten(-1, (groups, -1))
        chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, chosen, False)
        scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(-2)
    return scores.topk(top_k, dim=-1).indices


CHOICES: dict[str, Callable[[Tensor, int, int, int, int], Tensor]] = {"cpu": _choose, "cuda": kernel("router:choose")}


@operator("shoestring::choose")
def choose_experts(scores: Tensor, groups: int, best: int, top_groups: int, top_k: int) -> Tensor:
    """Scores [T, E] in equal groups, of which those ``top_groups`` are open whose ``best`` members sum highest."""
    return CHOICES[scores.device.type](scores, groups, best, top_groups, top_k)


@register_fake(choose_experts)
def _(scores: Tensor, groups: int, best: int, top_groups: int, top_k: int) -> Tensor:
    return scores.new_empty(scores.shape[0], top_k, dtype=torch.int64)


def choose(scores: Tensor, moe: MoEConfig) -> Tensor:
    """Indices [T, K] of the best experts by biased scores [T, E], reaching into ``top_groups`` groups at most."""
    # DeepSeek-V3 ranks a group by its two best biased scores, DeepSeek-V2 by its best score.
    best = 2 if moe.score is ScoreFunction.sigmoid and moe.experts > moe.groups else 1
    return choose_experts(scores, moe.groups, best, moe.top_groups, moe.top_k)


class Router(nn.Module):
    """Scores, choice, gates and statistics. Weight and bias stay in float32 when the model is BF16."""

    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moe = config.moe
        self.sequence: Sequence = WholeSequence()
        self.weight = nn.Parameter(torch.empty(config.moe.experts, config.hidden))
        self.register_buffer("bias", torch.zeros(config.moe.experts))

    def forward(self, x: Tensor) -> Routing:
        """x [B, S, H] -> the routing of its B * S tokens."""
        moe, sequences = self.moe, x.shape[0]
        logits = F.linear(x.to(self.weight.dtype), self.weight)
        scores = SCORES[moe.score](logits).flatten(0, 1)
        experts = choose(scores.detach() + self.bias, moe)
        gates = scores.gather(-1, experts)
        if moe.normalize_gates:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        counts = torch.zeros(sequences, moe.experts, dtype=torch.int64, device=x.device)
        chosen = experts.view(sequences, -1)
        counts = counts.scatter_add(1, chosen, torch.ones_like(chosen))
        # f is the whole sequence's, P sums over this shard: summed over the shards, f P is the whole sequence's.
        share = (scores / scores.sum(-1, keepdim=True)).view(sequences, -1, moe.experts).sum(1)
        length = chosen.shape[1] // moe.top_k * self.sequence.degree
        frequency = self.sequence.total(counts).to(scores.dtype) * (moe.experts / (moe.top_k * length))
        aux = (frequency * share).sum() / length
        return Routing(experts, gates * moe.gate_scale, aux, counts.sum(0))

    @torch.no_grad()
    def update_bias(self, load: Tensor, speed: float) -> None:
        """One step against the load error: ``load`` [E] counts the tokens of the whole global batch."""
        error = load.double().mean() - load
        self.bias += speed * error.sign().to(self.bias.dtype)
