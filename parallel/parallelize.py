"""From a plain model to a rank's part of it: one table, one order, one screen.

The table says where every parameter of our transformer lies. ``parallelize`` cuts the parameters as it says and swaps
what stands at the model's seams; the model itself stays what it was and never asks whether it is parallel.
"""

from torch import nn

from model.attention import LatentAttention
from model.block import Block
from model.config import ModelConfig
from model.experts import SwiGLU
from model.router import Router
from model.transformer import Transformer
from parallel.exchange import ExpertExchange
from parallel.loss import Part, VocabularyCrossEntropy
from parallel.mesh import Mesh, Traffic
from parallel.placement import REPLICATED, Placement, Plan, Row, Shard, cut, place
from parallel.tensor import ShardedSequence, VocabularyLookup
from parallel.topology import Axis

ROWS = Placement(Axis.tp, 0)  # outputs: heads, vocabulary
WIDTHS = Placement(Axis.tp, 1)  # inputs [outputs, inputs], or the width of a fused weight [2, width, inputs]
EXPERTS = Placement(Axis.ep, 0)


def plan_transformer(config: ModelConfig) -> Plan:
    """The table. The first row that matches a name counts; a row is there only if the model has such a parameter."""
    compressed = config.attention.q_rank is not None
    blocks = [*range(config.num_layers), *range(config.num_layers, config.num_layers + config.mtp.depth)]
    routed = any(map(config.is_moe, blocks))
    dense = not all(map(config.is_moe, blocks)) or config.moe.shared_experts > 0
    table = (
        (True, "embedding.weight", ROWS),
        (not config.tied, "head.weight", ROWS),
        (compressed, "*.mla.q_b.weight", ROWS),
        (not compressed, "*.mla.q.weight", ROWS),
        (True, "*.mla.kv_b.weight", ROWS),
        (True, "*.mla.o.weight", WIDTHS),
        (routed, "*.routed.*.weight", EXPERTS),
        (dense, "*.gate_up.weight", WIDTHS),
        (dense, "*.down.weight", WIDTHS),
        (routed, "*.router.weight", REPLICATED),
        (True, "*.mla.*kv_a.weight", REPLICATED),
        (True, "*norm.weight", REPLICATED),
        (config.mtp.depth > 0, "mtp.*.project.weight", REPLICATED),
    )
    return tuple(Row(pattern, placement) for there, pattern, placement in table if there)


def parallelize(model: Transformer, plan: Plan, mesh: Mesh) -> dict[str, Shard]:
    """Cut ``model``, whose parameters have no memory yet, to this rank's part. Returns what each parameter now is.

    Raises ValueError for a parameter without a row and for a row without a parameter.
    """
    placements = place(plan, [name for name, _ in model.named_parameters()])
    shards = {
        name: cut(parameter.shape, placements[name], mesh.topology, mesh.rank)
        for name, parameter in model.named_parameters()
    }
    if mesh.degree(Axis.tp) > 1:
        _shard_sequences(model, shards["embedding.weight"], mesh)
    if mesh.degree(Axis.ep) > 1:
        _exchange_tokens(model, mesh)
    for name, parameter in list(model.named_parameters()):
        part = nn.Parameter(parameter.detach()[shards[name].slices].clone())
        for owner, attribute in _find(model, parameter):
            setattr(owner, attribute, part)
    return shards


def _shard_sequences(model: Transformer, embedding: Shard, mesh: Mesh) -> None:
    group = mesh.group(Axis.tp, Traffic.tensor)
    sequence = ShardedSequence(group)
    for module in model.modules():
        if isinstance(module, LatentAttention | SwiGLU | Router):
            module.sequence = sequence
    first = embedding.offset[0]  # the head is cut at the same rows
    model.embedding.lookup = VocabularyLookup(first, sequence)
    model.cross_entropy = VocabularyCrossEntropy(Part(first, group), sequence)


def _exchange_tokens(model: Transformer, mesh: Mesh) -> None:
    moe = model.config.moe
    for module in model.modules():
        if isinstance(module, Block) and module.exchange is not None:
            module.exchange = ExpertExchange(moe.experts, moe.pad, mesh)


def _find(model: nn.Module, parameter: nn.Parameter) -> list[tuple[nn.Module, str]]:
    """Every module and attribute that holds ``parameter``."""
    return [
        (module, name)
        for module in model.modules()
        for name, other in module.named_parameters(recurse=False, remove_duplicate=False)
        if other is parameter
    ]
