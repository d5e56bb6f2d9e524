"""Which call reads which parameters: what a forward must have before it goes on.

attention, experts, mlp   a block's compute segments, whole: they may be compiled, and nothing waits inside
embedding, norms, ...     every module that has parameters of its own
norm --> the head         the loss reads the head's weight itself, right behind the last norm
"""

from collections.abc import Iterator

from torch import nn

from model.block import Block, Lane
from model.transformer import Transformer


def find_readers(stage: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules of ``stage`` and the parameters that their calls read. Together they have every parameter."""
    for module in stage.modules():
        own = list(module.parameters(recurse=False))
        if own:
            yield module, own
        if isinstance(module, Block):
            for segment in module.segments():
                if segment.lane is Lane.compute and isinstance(segment.module, nn.Module):
                    yield segment.module, list(segment.module.parameters())
    if isinstance(stage, Transformer) and hasattr(stage, "head"):
        yield stage.norm, list(stage.head.parameters())
