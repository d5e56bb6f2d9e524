"""From a plain model to a rank's part of it: one order, one screen.

The table (parallel/plan.py) says where every parameter lies. ``parallelize`` cuts the parameters as it says and swaps
what stands at the model's seams; the model itself stays what it was and never asks whether it is parallel.
"""

from collections.abc import Mapping

from torch import nn

from model.block import Block
from model.recompute import list_repeated
from model.sequence import WholeSequence
from model.transformer import Transformer
from parallel.config import OverlapConfig
from parallel.exchange import ExpertExchange
from parallel.loss import Part, VocabularyCrossEntropy
from parallel.mesh import Axis, Mesh, Traffic
from parallel.placement import Placement, Shard, cut, span
from parallel.tensor import ShardedSequence, VocabularyLookup, choose_operation


def parallelize(
    model: Transformer, placements: Mapping[str, Placement], mesh: Mesh, overlap: OverlapConfig
) -> dict[str, Shard]:
    """Cut ``model``, whose parameters have no memory yet, to this rank's part. Returns what each parameter now is.

    ``placements`` are those of the whole model, of which ``model`` may be a stage. Raises ValueError for an ``overlap``
    that there is nothing for here.
    """
    shards = {
        name: cut(parameter.shape, placements[name], mesh.topology, mesh.rank)
        for name, parameter in model.named_parameters()
    }
    if mesh.degree(Axis.tp) > 1:
        _shard_sequences(model, mesh, overlap)
    if mesh.degree(Axis.ep) > 1:
        _exchange_tokens(model, mesh, overlap.pieces)
    owners = _find_owners(model)
    for name, parameter in list(model.named_parameters()):
        part = nn.Parameter(parameter.detach()[shards[name].slices].clone())
        for owner, attribute in owners[parameter]:
            setattr(owner, attribute, part)
    return shards


def _shard_sequences(model: Transformer, mesh: Mesh, overlap: OverlapConfig) -> None:
    group = mesh.group(Axis.tp, Traffic.tensor)
    sequence = ShardedSequence(group, choose_operation(overlap.tensor, mesh), list_repeated(model.config))
    for module in model.modules():
        if isinstance(getattr(module, "sequence", None), WholeSequence):
            module.sequence = sequence  # type: ignore[assignment]
    # Embedding and head are cut at the same rows.
    first = span(model.config.vocab_size, mesh.degree(Axis.tp), mesh.coordinate(Axis.tp)).start
    if hasattr(model, "embedding"):
        model.embedding.lookup = VocabularyLookup(first, sequence)
    model.cross_entropy = VocabularyCrossEntropy(Part(first, group), sequence)


def _exchange_tokens(model: Transformer, mesh: Mesh, pieces: int) -> None:
    moe = model.config.moe
    for module in model.modules():
        if isinstance(module, Block) and module.exchange is not None:
            module.exchange = ExpertExchange(moe.experts, moe.pad, mesh, pieces, module.experts.routed.wanted)


def _find_owners(model: nn.Module) -> dict[nn.Parameter, list[tuple[nn.Module, str]]]:
    """Every module and attribute that holds a parameter."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name))
    return owners
