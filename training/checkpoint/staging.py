"""Room in host memory for what a rank saves, allocated once: a step waits for no disk, and hardly for the copy.

    step n updates --> lay_out --> step n + 1: forward, backward -->  it updates
                          '------> in a thread: fill ------> done? --------^

State changes in an update alone, so whoever copies has as long as forward and backward take.
"""

from collections.abc import Sequence
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor

from training.chunk import Chunk

ALIGNMENT, WORD = 64, 8  # bytes


class Staged(NamedTuple):
    """What a buffer is to have, and where from."""

    chunks: list[Chunk]
    copies: list[Chunk]
    device: torch.device  # of the chunks
    ready: torch.Event | None  # on another device than the CPU: what the chunks are to have been given
    filled: Event

    def fill(self) -> list[Chunk]:
        """The copies, once they are made. In any thread; nobody may change the chunks meanwhile: see ``wait``."""
        try:
            if self.ready is None:
                self._copy()
            else:
                stream = torch.Stream(self.device)  # beside what the device computes
                stream.wait_event(self.ready)
                with stream:
                    self._copy()
                stream.synchronize()
        finally:
            self.filled.set()
        return self.copies

    def wait(self) -> None:
        """Returns once the chunks may change."""
        self.filled.wait()

    @torch.no_grad()
    def _copy(self) -> None:
        for copy, chunk in zip(self.copies, self.chunks, strict=True):
            copy.tensor.copy_(chunk.tensor, non_blocking=True)


class Staging:
    """One buffer, which every save fills from its beginning."""

    def __init__(self, device: torch.device) -> None:
        """``device``: that of the chunks. Copies from another one than the CPU go to memory that is pinned."""
        self._device, self._buffer = device, torch.empty(0, dtype=torch.uint8)

    def lay_out(self, chunks: Sequence[Chunk]) -> Staged:
        """Places for copies, which stay as they are until the next call, of what ``chunks`` have now."""
        starts, end = [], 0
        for chunk in chunks:
            # Words of memory stay words, which training/health/fingerprint.py sums.
            within = chunk.tensor.data_ptr() % WORD if chunk.tensor.is_contiguous() else 0
            starts.append(end + within)
            end += -(-(within + chunk.tensor.nbytes) // ALIGNMENT) * ALIGNMENT
        if self._buffer.numel() < end:
            self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=self._device.type != "cpu")
        copies = [
            chunk._replace(tensor=self._view(chunk.tensor, start)) for chunk, start in zip(chunks, starts, strict=True)
        ]
        ready = None
        if self._device.type != "cpu":
            ready = torch.accelerator.current_stream(self._device).record_event()
        return Staged(list(chunks), copies, self._device, ready, Event())

    def take(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Copies, made at once."""
        return self.lay_out(chunks).fill()

    def _view(self, like: Tensor, start: int) -> Tensor:
        return self._buffer[start : start + like.nbytes].view(like.dtype).view(like.shape)
