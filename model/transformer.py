"""The model on one device: embedding, blocks, head, and multi-token prediction (DeepSeek-V3, sections 2.1 and 2.2).

    ids --> embedding --> block 0 ... block L-1 --> norm --> head --> cross entropy with the next token
                                          |
                                          h^0          depth d = 1 .. D predicts one token further each:
    h^d = block(project([norm(h^(d-1)); norm(embedding of the token d ahead)])) --> norm --> the same head

Loss = main / tokens + weight / D * sum_d mtp_d / tokens_d + alpha * aux / sequences; the denominators are those of the
whole global batch and are given. Shapes: B sequences, S tokens, H hidden, V vocabulary, T = B * S.
"""

import torch
from torch import Tensor, nn

from model.attention import Cache, Context
from model.batch import Batch, Denominators, Losses, slice_labels
from model.block import Block, BlockOutput
from model.config import ModelConfig
from model.core import Core, attend
from model.embedding import Embedding
from model.exchange import Exchange
from model.linear import Deferred, Linear
from model.loss import CrossEntropy, cross_entropy
from model.rope import tables
from model.router import Router, Routing


class MTPModule(nn.Module):
    """One depth of multi-token prediction: a block over the previous depth's state and the next token's embedding."""

    def __init__(self, config: ModelConfig, layer: int, core: Core, exchange: Exchange | None) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.embedding_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.project = Linear(2 * config.hidden, config.hidden)
        self.block = Block(config, layer, core, exchange)
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(self, x: Tensor, embedded: Tensor, context: Context) -> BlockOutput:
        """State [B, S, H] and embedding of the token ahead [B, S, H] -> the next state, before its norm."""
        joined = torch.cat((self.hidden_norm(x), self.embedding_norm(embedded)), dim=-1)
        return self.block(self.project(joined, context.deferred), context)


class Transformer(nn.Module):
    """A DeepSeek-V3-style language model. ``core`` and ``exchange`` are the seams for parallelism."""

    def __init__(self, config: ModelConfig, core: Core = attend, exchange: Exchange | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Block(config, i, core, exchange) for i in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.cross_entropy: CrossEntropy = cross_entropy
        self.head = self.embedding if config.tied else Linear(config.hidden, config.vocab_size)
        self.mtp = nn.ModuleList(
            MTPModule(config, config.num_layers + d, core, exchange) for d in range(config.mtp.depth)
        )

    def forward(self, batch: Batch, denominators: Denominators, deferred: Deferred = None) -> Losses:
        """One micro-batch's share of the loss of the global batch."""
        depth = self.config.mtp.depth
        length = batch.ids.shape[1] - 1 - depth
        context = self._context(torch.arange(length, device=batch.ids.device))
        context = context._replace(documents=batch.documents, deferred=deferred)
        x, routings = self._trunk(batch.ids[:, :length], context)
        sums = [self._cross_entropy(self.norm(x), batch, 0)]
        for d, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            x, routing = module(x, self.embedding(batch.ids[:, d : d + length]), context)
            routings.append(routing)
            sums.append(self._cross_entropy(module.norm(x), batch, d))
        return self._losses(sums, [r for r in routings if r is not None], denominators)

    def logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], at least float32. With a cache, the tokens follow those cached."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x, _ = self._trunk(tokens, self._context(positions)._replace(cache=cache))
        logits = self.norm(x) @ self.head.weight.t()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def routers(self) -> list[Router]:
        """The routers in the order of ``Losses.load``."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def update_biases(self, load: Tensor, speed: float) -> None:
        """Move every router's selection bias against its load [layers, E] over the whole global batch."""
        for router, counts in zip(self.routers(), load, strict=True):
            router.update_bias(counts, speed)

    def _context(self, positions: Tensor) -> Context:
        return Context(*tables(self.config.rope, self.config.attention.rope_dim, positions))

    def _trunk(self, tokens: Tensor, context: Context) -> tuple[Tensor, list[Routing | None]]:
        x, routings = self.embedding(tokens), []
        for block in self.layers:
            x, routing = block(x, context)
            routings.append(routing)
        return x, routings

    def _cross_entropy(self, hidden: Tensor, batch: Batch, d: int) -> Tensor:
        labels, counted = slice_labels(batch, self.config.mtp.depth, d)
        return self.cross_entropy(hidden, self.head.weight, labels, counted)

    def _losses(self, sums: list[Tensor], routings: list[Routing], denominators: Denominators) -> Losses:
        config, stacked = self.config, torch.stack(sums)
        total = stacked[0] / denominators.tokens[0]
        for d in range(1, len(sums)):
            total = total + config.mtp.weight / config.mtp.depth * stacked[d] / denominators.tokens[d]
        aux = sum((r.aux for r in routings), stacked.new_zeros(()))
        if config.moe.aux_alpha:
            total = total + config.moe.aux_alpha * aux / denominators.sequences
        load = torch.stack([r.load for r in routings]) if routings else torch.zeros(0, 0, dtype=torch.int64)
        return Losses(total, stacked.detach(), aux.detach(), load)
