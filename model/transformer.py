"""The model on one device: embedding, blocks, head, and multi-token prediction (DeepSeek-V3, sections 2.1 and 2.2).

    ids --> embedding --> block 0 ... block L-1 --> norm --> head --> cross entropy with the next token
                                          |
                                          h^0          depth d = 1 .. D predicts one token further each:
    h^d = block(project([norm(h^(d-1)); norm(embedding of the token d ahead)])) --> norm --> the same head

A pipeline stage is the same model with a stretch of the layers: the first has the embedding, the last what follows
block L-1 (and the embedding, if MTP or a tied head reads it). Names stay those of the whole model.

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
from model.loss import CrossEntropy, cross_entropy, widen
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


class Elsewhere(nn.Module):
    """Stands for a layer that another stage has."""


class Transformer(nn.Module):
    """A DeepSeek-V3-style language model, or a stage of one; ``core`` and ``exchange`` are seams for parallelism."""

    def __init__(
        self,
        config: ModelConfig,
        layers: range | None = None,
        core: Core = attend,
        exchange: Exchange | None = None,
    ) -> None:
        """``layers``: those of this stage; all without it."""
        super().__init__()
        self.config = config
        self.here = range(config.num_layers) if layers is None else layers
        first, last = self.here.start == 0, self.here.stop == config.num_layers
        depth = config.mtp.depth if last else 0
        if first or depth or (last and config.tied):
            self.embedding = Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(
            Block(config, i, core, exchange) if i in self.here else Elsewhere() for i in range(config.num_layers)
        )
        self.cross_entropy: CrossEntropy = cross_entropy
        if last:
            self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
            self.head = self.embedding if config.tied else Linear(config.hidden, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, config.num_layers + d, core, exchange) for d in range(depth))

    def forward(
        self, batch: Batch, denominators: Denominators, deferred: Deferred = None, x: Tensor | None = None
    ) -> Losses:
        """One micro-batch's share of the loss of the global batch. ``x`` [B, S, H] comes from the stage before."""
        depth = self.config.mtp.depth
        length = batch.ids.shape[1] - 1 - depth
        context = self._context(torch.arange(length, device=batch.ids.device))
        context = context._replace(documents=batch.documents, deferred=deferred)
        x, routings = self._trunk(self.embedding(batch.ids[:, :length]) if x is None else x, context)
        if self.here.stop < self.config.num_layers:
            return self._losses([], routings, denominators)._replace(hidden=x)
        sums = [self._cross_entropy(self.norm(x), batch, 0)]
        for d, module in enumerate(self.mtp, start=1):
            assert isinstance(module, MTPModule)
            x, routing = module(x, self.embedding(batch.ids[:, d : d + length]), context)
            routings.append(routing)
            sums.append(self._cross_entropy(module.norm(x), batch, d))
        return self._losses(sums, routings, denominators)

    def logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], at least float32. With a cache, the tokens follow those cached."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x, _ = self._trunk(self.embedding(tokens), self._context(positions)._replace(cache=cache))
        logits = self.norm(x) @ self.head.weight.t()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def routers(self) -> list[Router]:
        """The routers that are here, in the order of ``rows``."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def rows(self) -> list[int]:
        """The rows of ``Losses.load`` that are this stage's: the whole model has one for each routed block."""
        here = [*self.here, *range(self.config.num_layers, self.config.num_layers + len(self.mtp))]
        return [row for row, block in enumerate(self.config.routed_blocks()) if block in here]

    def update_biases(self, load: Tensor, speed: float) -> None:
        """Move every router's selection bias against its load [layers, E] over the whole global batch."""
        for router, counts in zip(self.routers(), load[self.rows()], strict=True):
            router.update_bias(counts, speed)

    def _context(self, positions: Tensor) -> Context:
        return Context(*tables(self.config.rope, self.config.attention.rope_dim, positions))

    def _trunk(self, x: Tensor, context: Context) -> tuple[Tensor, list[Routing | None]]:
        routings = []
        for i in self.here:
            x, routing = self.layers[i](x, context)
            routings.append(routing)
        return x, routings

    def _cross_entropy(self, hidden: Tensor, batch: Batch, d: int) -> Tensor:
        labels, counted = slice_labels(batch, self.config.mtp.depth, d)
        return self.cross_entropy(hidden, self.head.weight, labels, counted)

    def _losses(self, sums: list[Tensor], routings: list[Routing | None], denominators: Denominators) -> Losses:
        """Of this stage: cross entropy is the last one's, the auxiliary loss and the load are those of its routers."""
        config, here = self.config, [r for r in routings if r is not None]
        weight = next(self.parameters())
        zero = torch.zeros((), dtype=widen(weight.dtype), device=weight.device)
        total = sum(
            (
                (config.mtp.weight / config.mtp.depth if d else 1.0) * loss / denominators.tokens[d]
                for d, loss in enumerate(sums)
            ),
            zero,
        )
        aux = sum((r.aux for r in here), zero)
        if config.moe.aux_alpha:
            total = total + config.moe.aux_alpha * aux / denominators.sequences
        load = torch.zeros(len(config.routed_blocks()), config.moe.experts, dtype=torch.int64, device=zero.device)
        if here:
            load[self.rows()] = torch.stack([r.load for r in here])
        stacked = torch.stack(sums) if sums else zero.expand(1 + config.mtp.depth)
        return Losses(total, stacked.detach(), aux.detach(), load)
