"""DeepSeek-V3's forward and loss written out token by token from the papers, sharing no code with model/.

One token, one head and one expert at a time, on vectors; only the parameters' names and their order of rows are the
model's. Slow on purpose: nothing is batched, padded, fused, chunked or sorted. Gradients are those of torch's autograd.

    attention   DeepSeek-V2, arXiv 2405.04434, section 2.1;  rope: arXiv 2104.09864;  YaRN: arXiv 2309.00071
    experts     DeepSeek-V3, arXiv 2412.19437, section 2.1.2;  multi-token prediction: section 2.2
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from model.batch import Batch, Denominators
from model.config import ModelConfig, RopeConfig


class NaiveLosses(NamedTuple):
    total: Tensor
    sums: Tensor
    aux: Tensor
    load: Tensor


class Routed(NamedTuple):
    """One token's routing."""

    experts: list[int]
    gates: list[Tensor]
    shares: Tensor  # [E] scores that sum to one


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def angle_speeds(rope: RopeConfig, dim: int) -> list[float]:
    """The angle per position of each rotated pair, as in YaRN's published code."""
    speeds = [rope.theta ** (-2 * i / dim) for i in range(dim // 2)]
    if rope.factor == 1:
        return speeds

    def pair_turning(turns: float) -> float:
        return dim / 2 * math.log(rope.original_length / (2 * math.pi * turns)) / math.log(rope.theta)

    low = max(0, math.floor(pair_turning(rope.beta_fast)))
    high = min(dim - 1, math.ceil(pair_turning(rope.beta_slow)))
    stretched = []
    for i, speed in enumerate(speeds):
        keep = 1 - min(1.0, max(0.0, (i - low) / max(high - low, 0.001)))
        stretched.append(keep * speed + (1 - keep) * speed / rope.factor)
    return stretched


def yarn_scale(factor: float, weight: float) -> float:
    return 1 + 0.1 * weight * math.log(factor) if factor > 1 else 1.0


def rotate_at(x: Tensor, position: int, rope: RopeConfig) -> Tensor:
    """Each pair (x[i], x[i + R/2]) turned by position * speed."""
    half = len(x) // 2
    length = yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
    out: list[Tensor] = [x[0]] * len(x)
    for i, speed in enumerate(angle_speeds(rope, len(x))):
        cos, sin = length * math.cos(position * speed), length * math.sin(position * speed)
        out[i] = x[i] * cos - x[i + half] * sin
        out[i + half] = x[i] * sin + x[i + half] * cos
    return torch.stack(out)


class NaiveDeepSeek:
    """``weights`` are a model's parameters and buffers by name."""

    def __init__(self, weights: dict[str, Tensor], config: ModelConfig) -> None:
        self.weights, self.config = weights, config

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.norm_eps if eps is None else eps)

    def attention(self, name: str, xs: list[Tensor], documents: list[int]) -> list[Tensor]:
        """One sequence of normalised tokens -> the attention's output for each."""
        a, rope, w = self.config.attention, self.config.rope, self.weights
        queries, keys, values = [], [], []
        for position, x in enumerate(xs):
            if a.q_rank is None:
                q = w[f"{name}.q.weight"] @ x
                kv = w[f"{name}.kv_a.weight"] @ x
            else:
                down = w[f"{name}.q_kv_a.weight"] @ x
                q = w[f"{name}.q_b.weight"] @ self.norm(f"{name}.q_norm", down[: a.q_rank], 1e-6)
                kv = down[a.q_rank :]
            up = w[f"{name}.kv_b.weight"] @ self.norm(f"{name}.kv_norm", kv[: a.kv_rank], 1e-6)
            shared_key = rotate_at(kv[a.kv_rank :], position, rope)
            q_heads, up_heads = q.chunk(a.heads), up.chunk(a.heads)
            queries.append([torch.cat((h[: a.nope_dim], rotate_at(h[a.nope_dim :], position, rope))) for h in q_heads])
            keys.append([torch.cat((h[: a.nope_dim], shared_key)) for h in up_heads])
            values.append([h[a.nope_dim :] for h in up_heads])
        scale = yarn_scale(rope.factor, rope.mscale_all_dim) ** 2 / math.sqrt(a.nope_dim + a.rope_dim)
        outputs = []
        for t in range(len(xs)):
            seen = [s for s in range(t + 1) if documents[s] == documents[t]]
            heads = []
            for head in range(a.heads):
                weights = torch.stack([scale * queries[t][head] @ keys[s][head] for s in seen]).exp()
                mixed = sum(weight * values[s][head] for weight, s in zip(weights, seen, strict=True))
                heads.append(mixed / weights.sum())
            outputs.append(w[f"{name}.o.weight"] @ torch.cat(heads))
        return outputs

    def swiglu(self, gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        return down @ (silu(gate_up[0] @ x) * (gate_up[1] @ x))

    def route(self, name: str, x: Tensor) -> Routed:
        moe = self.config.moe
        logits = self.weights[f"{name}.weight"] @ x
        sigmoid = moe.score == "sigmoid"
        scores = 1 / (1 + (-logits).exp()) if sigmoid else logits.exp() / logits.exp().sum()
        biased = [s + b for s, b in zip(scores.tolist(), self.weights[f"{name}.bias"].tolist(), strict=True)]
        size = moe.experts // moe.groups
        ranking = []
        for group in range(moe.groups):
            members = sorted(biased[group * size : (group + 1) * size], reverse=True)
            ranking.append((sum(members[:2]) if sigmoid else members[0], group))
        open_groups = {group for _, group in sorted(ranking, reverse=True)[: moe.top_groups]}
        allowed = [e for e in range(moe.experts) if e // size in open_groups]
        chosen = sorted(allowed, key=lambda e: biased[e], reverse=True)[: moe.top_k]
        total = sum(scores[e] for e in chosen) if moe.normalize_gates else 1.0
        return Routed(chosen, [moe.gate_scale * scores[e] / total for e in chosen], scores / scores.sum())

    def feed_forward(self, name: str, x: Tensor, routed: Routed | None) -> Tensor:
        w, moe = self.weights, self.config.moe
        if routed is None:
            return self.swiglu(w[f"{name}.mlp.swiglu.gate_up.weight"], w[f"{name}.mlp.swiglu.down.weight"], x)
        gate_up, down = w[f"{name}.experts.routed.gate_up.weight"], w[f"{name}.experts.routed.down.weight"]
        y = torch.zeros_like(x)
        for expert, gate in zip(routed.experts, routed.gates, strict=True):
            y = y + gate * self.swiglu(gate_up[expert], down[expert], x)
        shared = f"{name}.experts.shared"
        if moe.shared_experts:
            # Shared experts are stored side by side: each is one slice of the intermediate width.
            for gates, out in zip(
                w[f"{shared}.gate_up.weight"].split(moe.ffn, dim=1),
                w[f"{shared}.down.weight"].split(moe.ffn, dim=1),
                strict=True,
            ):
                y = y + self.swiglu(gates, out, x)
        return y

    def block(self, name: str, xs: list[Tensor], documents: list[int]) -> tuple[list[Tensor], list[Routed]]:
        normed = [self.norm(f"{name}.attention.norm", x) for x in xs]
        attended = self.attention(f"{name}.attention.mla", normed, documents)
        out, routings = [], []
        for x, y in zip(xs, attended, strict=True):
            h = x + y
            normed_h = self.norm(f"{name}.attention.mlp_norm", h)
            router = f"{name}.attention.router"
            routed = self.route(router, normed_h) if f"{router}.weight" in self.weights else None
            out.append(h + self.feed_forward(name, normed_h, routed))
            if routed is not None:
                routings.append(routed)
        return out, routings

    def logits(self, x: Tensor, norm: str) -> Tensor:
        head = "embedding.weight" if self.config.tied else "head.weight"
        return self.weights[head] @ self.norm(norm, x)

    def sequence(self, ids: list[int], documents: list[int]) -> tuple[list[list[Tensor]], list[list[Routed]]]:
        """Logits of every depth and token, and the routing of every layer and token."""
        depth, table = self.config.mtp.depth, self.weights["embedding.weight"]
        length = len(ids) - 1 - depth
        xs, routings = [table[i] for i in ids[:length]], []
        for layer in range(self.config.num_layers):
            xs, routed = self.block(f"layers.{layer}", xs, documents)
            routings.append(routed)
        logits = [[self.logits(x, "norm") for x in xs]]
        for d in range(1, depth + 1):
            name = f"mtp.{d - 1}"
            joined = []
            for t, x in enumerate(xs):
                ahead = self.norm(f"{name}.embedding_norm", table[ids[t + d]])
                both = torch.cat((self.norm(f"{name}.hidden_norm", x), ahead))
                joined.append(self.weights[f"{name}.project.weight"] @ both)
            xs, routed = self.block(f"{name}.block", joined, documents)
            routings.append(routed)
            logits.append([self.logits(x, f"{name}.norm") for x in xs])
        return logits, [r for r in routings if r]

    def losses(self, batch: Batch, denominators: Denominators) -> NaiveLosses:
        config, moe = self.config, self.config.moe
        depth = config.mtp.depth
        sums = [torch.zeros((), dtype=torch.float64) for _ in range(1 + depth)]
        aux, load = torch.zeros((), dtype=torch.float64), []
        for b in range(len(batch.ids)):
            ids = batch.ids[b].tolist()
            length = len(ids) - 1 - depth
            documents = [0] * length if batch.documents is None else batch.documents[b].tolist()
            logits, routings = self.sequence(ids, documents)
            for d in range(1 + depth):
                for t in range(length):
                    if batch.counted[b, t + 1 + d]:
                        probability = logits[d][t].exp() / logits[d][t].exp().sum()
                        sums[d] = sums[d] - probability[ids[t + 1 + d]].log()
            counts = [[sum(e in token.experts for token in r) for e in range(moe.experts)] for r in routings]
            load.append(counts)
            for layer, routed in enumerate(routings):
                for e in range(moe.experts):
                    frequency = moe.experts / (moe.top_k * length) * counts[layer][e]
                    aux = aux + frequency * sum(token.shares[e] for token in routed) / length
        total = sums[0] / denominators.tokens[0] + moe.aux_alpha * aux / denominators.sequences
        for d in range(1, 1 + depth):
            total = total + config.mtp.weight / depth * sums[d] / denominators.tokens[d]
        return NaiveLosses(total, torch.stack(sums), aux, torch.tensor(load).sum(0))
