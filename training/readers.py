"""Which call reads which parameters: what a forward must have before it goes on.

attention, experts, mlp   a block's compute segments, whole: they may be compiled, and nothing waits inside
embedding, norms, ...     every other module that has parameters of its own
norm --> the head         the loss reads the head's weight itself, right behind the last norm
"""

from collections.abc import Iterator

from torch import nn

from model.block import Block, Lane
from model.transformer import Transformer

Reader = tuple[nn.Module, list[nn.Parameter]]


def find_readers(stage: nn.Module) -> Iterator[Reader]:
    """Modules of ``stage`` and the parameters that their calls read. Together they have every parameter."""
    yield from _search(stage)
    if isinstance(stage, Transformer) and hasattr(stage, "head"):
        yield stage.norm, list(stage.head.parameters())


def _search(module: nn.Module) -> Iterator[Reader]:
    if isinstance(module, Block):
        for segment in module.segments():
            if segment.lane is Lane.compute and isinstance(segment.module, nn.Module):
                yield segment.module, list(segment.module.parameters())
        return
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        yield from _search(child)
