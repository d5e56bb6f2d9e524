"""What is done to a micro-batch in a stage, in order, as segments; the forward of the model is to run them.

    embedding | segments of block 0 | ... | segments of block L-1 | head | project | segments of a block | head | losses
    first stage                                                     last stage, and again for every depth of MTP

Loss = main / tokens + weight / D * sum_d mtp_d / tokens_d + alpha * aux / sequences; the denominators are those of the
whole global batch and are given. All that a segment needs of those before it is in its carry, a ``Flow``, also weights
that several segments read: whoever cuts the graph between two segments (parallel/overlap) sees all that crosses.
Shapes: B sequences, S tokens, H hidden, V vocabulary, E experts.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from model.attention import Context
from model.batch import Batch, Denominators, Losses, slice_labels
from model.block import BlockOutput
from model.config import ModelConfig
from model.linear import Deferred
from model.loss import widen
from model.rope import tables
from model.segment import Lane, Segment, run

if TYPE_CHECKING:
    from model.transformer import Transformer


class Flow(NamedTuple):
    """What a stage has of a micro-batch between two segments; ``None`` where nobody reads it further on."""

    x: Any  # [B, S, H], or the carry of the block that it is in
    aux: Tensor  # auxiliary loss so far, summed over sequences and layers
    load: tuple[Tensor, ...] = ()  # [E] each, of the routed blocks so far
    sums: tuple[Tensor, ...] = ()  # cross entropies so far
    embedding: Tensor | None = None  # [V, H]
    head: Tensor | None = None  # [V, H]


def locate(config: ModelConfig, positions: Tensor) -> Context:
    """The context of tokens at ``positions`` [S]."""
    return Context(*tables(config.rope, config.attention.rope_dim, positions))


def share(model: "Transformer", batch: Batch, deferred: Deferred = None) -> Context:
    """What the segments of a micro-batch share."""
    positions = torch.arange(_count_inputs(model, batch), device=batch.ids.device)
    return locate(model.config, positions)._replace(documents=batch.documents, deferred=deferred)


def begin(model: "Transformer", x: Tensor | None) -> Flow:
    """The carry of the first segment; ``x`` [B, S, H] comes from the stage before."""
    weight = next(model.parameters())
    return Flow(x, torch.zeros((), dtype=widen(weight.dtype), device=weight.device))


def list_segments(
    model: "Transformer", batch: Batch, denominators: Denominators, whole_blocks: bool = False
) -> list[Segment]:
    """All that is done to a micro-batch, in order, from what ``begin`` gives to its ``Losses``."""
    segments: list[Segment] = []

    def compute(name: str, step: Callable[..., Any], *arguments: Any) -> None:
        segments.append(Segment(name, Lane.compute, partial(step, model, *arguments)))

    def unroll(name: str, block: Any) -> None:
        inner = (Segment("block", Lane.compute, block),) if whole_blocks else block.segments()
        segments.extend(s._replace(name=f"{name}.{s.name}", module=partial(_inside, s.module)) for s in inner)

    if model.here.start == 0:
        compute("embedding", _embed, batch)
    for i in model.here:
        unroll(f"layers.{i}", model.layers[i])
    if model.here.stop == model.config.num_layers:
        compute("head", _score, batch, 0)
        for d, module in enumerate(model.mtp, start=1):
            compute(f"mtp.{d - 1}.project", _look_ahead, batch, d)
            unroll(f"mtp.{d - 1}", module.block)
            compute(f"mtp.{d - 1}.head", _score, batch, d)
    compute("losses", _add_up, denominators)
    return segments


def pass_through(
    model: "Transformer", batch: Batch, denominators: Denominators, deferred: Deferred, x: Tensor | None
) -> Losses:
    """All of it without a stop, blocks as wholes: see ``Transformer.forward``."""
    segments = list_segments(model, batch, denominators, whole_blocks=True)
    made: Losses = run(segments, begin(model, x), share(model, batch, deferred))
    return made


def _count_inputs(model: "Transformer", batch: Batch) -> int:
    """Tokens of a sequence, without those that are only labels."""
    return batch.ids.shape[1] - 1 - model.config.mtp.depth


def _inside(step: Callable[[Any, Context], Any], flow: Flow, context: Context) -> Flow:
    """A segment of a block, or all of it."""
    made = step(flow.x, context)
    if not isinstance(made, BlockOutput):
        return flow._replace(x=made)
    x, routing = made
    if routing is None:
        return flow._replace(x=x)
    return flow._replace(x=x, aux=flow.aux + routing.aux, load=(*flow.load, routing.load))


def _embed(model: "Transformer", batch: Batch, flow: Flow, context: Context) -> Flow:
    again = model.here.stop == model.config.num_layers and _reads_embedding(model)
    x = model.embedding(batch.ids[:, : _count_inputs(model, batch)])
    return flow._replace(x=x, embedding=model.embedding.weight if again else None)


def _score(model: "Transformer", batch: Batch, d: int, flow: Flow, context: Context) -> Flow:
    """The cross entropy of depth ``d``."""
    flow = _take_weights(model, flow)
    labels, counted = slice_labels(batch, model.config.mtp.depth, d)
    norm: Any = model.mtp[d - 1].norm if d else model.norm
    weight = flow.embedding if model.config.tied else flow.head
    assert weight is not None
    flow = flow._replace(sums=(*flow.sums, model.cross_entropy(norm(flow.x), weight, labels, counted)))
    return flow if d < len(model.mtp) else flow._replace(x=None, embedding=None, head=None)


def _look_ahead(model: "Transformer", batch: Batch, d: int, flow: Flow, context: Context) -> Flow:
    """The state of depth ``d`` before its block."""
    flow = _take_weights(model, flow)
    assert flow.embedding is not None
    embedded = model.embedding.lookup(batch.ids[:, d : d + _count_inputs(model, batch)], flow.embedding)
    return flow._replace(x=model.mtp[d - 1](flow.x, embedded, context))


def _reads_embedding(model: "Transformer") -> bool:
    """Whether what follows the last layer reads the embedding."""
    return model.config.tied or len(model.mtp) > 0


def _take_weights(model: "Transformer", flow: Flow) -> Flow:
    """With the weights that what follows the last layer reads, which go along from here on."""
    if flow.embedding is None and _reads_embedding(model):
        flow = flow._replace(embedding=model.embedding.weight)
    if flow.head is None and not model.config.tied:
        flow = flow._replace(head=model.head.weight)
    return flow


def _add_up(model: "Transformer", denominators: Denominators, flow: Flow, context: Context) -> Losses:
    """Of this stage: cross entropy is the last one's, the auxiliary loss and the load are those of its routers."""
    config, depth = model.config, model.config.mtp.depth
    total = torch.zeros_like(flow.aux)
    for d, loss in enumerate(flow.sums):
        total = total + (config.mtp.weight / depth if d else 1.0) * loss / denominators.tokens[d]
    if config.moe.aux_alpha:
        total = total + config.moe.aux_alpha * flow.aux / denominators.sequences
    load = flow.aux.new_zeros(len(config.routed_blocks()), config.moe.experts, dtype=torch.int64)
    if flow.load:
        load[model.rows()] = torch.stack(flow.load)
    sums = torch.stack(flow.sums) if flow.sums else flow.aux.new_zeros(()).expand(1 + depth)
    return Losses(total, sums.detach(), flow.aux.detach(), load, flow.x)
