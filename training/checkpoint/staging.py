"""Room in host memory for what a rank saves, allocated once: a step waits for this copy, not for a disk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from training.chunk import Chunk

ALIGNMENT = 64  # bytes


class Staging:
    """One buffer, which every save fills from its beginning."""

    def __init__(self, device: torch.device) -> None:
        """``device``: that of the chunks. Copies from another one than the CPU go to memory that is pinned."""
        self._device, self._buffer = device, torch.empty(0, dtype=torch.uint8)

    @torch.no_grad()
    def take(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Copies, which stay as they are until the next call."""
        starts, end = [], 0
        for chunk in chunks:
            starts.append(end)
            end += -(-chunk.tensor.nbytes // ALIGNMENT) * ALIGNMENT
        if self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._device.type != "cpu")
        copies = [
            chunk._replace(tensor=self._view(chunk.tensor, start)) for chunk, start in zip(chunks, starts, strict=True)
        ]
        for copy, chunk in zip(copies, chunks, strict=True):
            copy.tensor.copy_(chunk.tensor, non_blocking=True)
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return copies

    def _view(self, like: Tensor, start: int) -> Tensor:
        return self._buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
