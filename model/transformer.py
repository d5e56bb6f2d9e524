"""The model on one device: embedding, blocks, head, and multi-token prediction (DeepSeek-V3, sections 2.1 and 2.2).

    ids --> embedding --> block 0 ... block L-1 --> norm --> head --> cross entropy with the next token
                                          |
                                          h^0          depth d = 1 .. D predicts one token further each:
    h^d = block(project([norm(h^(d-1)); norm(embedding of the token d ahead)])) --> norm --> the same head

A pipeline stage is the same model with a stretch of the layers: the first has the embedding, the last what follows
block L-1 (and the embedding, if MTP or a tied head reads it). Names stay those of the whole model.

Shapes: B sequences, S tokens, H hidden, V vocabulary, T = B * S.
"""

import torch
from torch import Tensor, nn

from model.attention import Cache, Context
from model.batch import Batch, Denominators, Losses
from model.block import Block
from model.config import ModelConfig
from model.core import Core, attend
from model.embedding import Embedding
from model.exchange import Exchange
from model.flow import locate, pass_through
from model.linear import Deferred, Linear
from model.loss import CrossEntropy, cross_entropy
from model.router import Router


class MTPModule(nn.Module):
    """One depth of multi-token prediction: a block over the previous depth's state and the next token's embedding."""

    def __init__(self, config: ModelConfig, layer: int, core: Core, exchange: Exchange | None) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.embedding_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.project = Linear(2 * config.hidden, config.hidden)
        self.block = Block(config, layer, core, exchange)
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(self, x: Tensor, embedded: Tensor, context: Context) -> Tensor:
        """State [B, S, H] and embedding of the token ahead [B, S, H] -> what its block takes. The rest is segments."""
        joined = torch.cat((self.hidden_norm(x), self.embedding_norm(embedded)), dim=-1)
        return self.project(joined, context.deferred)


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
        return pass_through(self, batch, denominators, deferred, x)

    def logits(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """tokens [B, S] -> logits [B, S, V], at least float32. With a cache, the tokens follow those cached."""
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self._trunk(self.embedding(tokens), locate(self.config, positions)._replace(cache=cache))
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

    def _trunk(self, x: Tensor, context: Context) -> Tensor:
        for i in self.here:
            x, _ = self.layers[i](x, context)
        return x
