"""Which call reads which parameters: what a forward must have before it goes on.

attention, experts, mlp   a block's compute segments, whole: they may be compiled, and nothing waits inside
embedding, norms, ...     every other module that has parameters of its own
norm --> the head         what follows the last norm reads the head's weight itself, and with MTP the embedding's
"""

from collections.abc import Iterator

from torch import nn

from model.block import COMPUTE
from model.transformer import Transformer

Reader = tuple[nn.Module, list[nn.Parameter]]


def find_readers(stage: nn.Module) -> Iterator[Reader]:
    """Modules of ``stage`` and the parameters that their calls read. Together they have every parameter."""
    yield from _search(stage)
    if isinstance(stage, Transformer) and hasattr(stage, "head"):
        behind = [stage.head, stage.embedding] if len(stage.mtp) else [stage.head]
        yield stage.norm, [parameter for module in behind for parameter in module.parameters()]


def _search(module: nn.Module) -> Iterator[Reader]:
    inner = [child for child in module.modules() if child is not module and isinstance(child, COMPUTE)]
    if isinstance(module, COMPUTE):  # shared experts lie in the routed ones' segment, and are called by themselves
        apart = {parameter for child in inner for parameter in child.parameters()}
        yield module, [parameter for parameter in module.parameters() if parameter not in apart]
        for segment in inner:
            yield from _search(segment)
        return
    own = list(module.parameters(recurse=False))
    if own:
        yield module, own
    for child in module.children():
        yield from _search(child)
