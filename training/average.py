"""The exponential moving average of the weights (``optimizer.ema``), in host memory: what the weights are without the
noise of the last steps. DeepSeek-V3 judges by it before the learning rate has fallen (arXiv 2412.19437, 3.2.3).

    update applied --> masters copied to the host --> in a thread, while the next step computes: e = d e + (1 - d) w

Each rank averages the masters that it owns, in their dtype; the average begins as the first weights are.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from training.checkpoint.staging import Staging
from training.chunk import Chunk
from training.engine import Engine

MASTER, KIND = "master/", "ema/"


class Average:
    """That of the masters of an engine, on one rank."""

    def __init__(self, engine: Engine, device: torch.device, decay: float | None) -> None:
        """``device``: that of the masters. None averages nothing."""
        self._engine, self._decay = engine, decay
        self._staging = Staging(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._work: Future[None] | None = None
        self._chunks = [
            chunk._replace(
                name=KIND + chunk.name.removeprefix(MASTER), tensor=torch.empty_like(chunk.tensor, device="cpu")
            )
            for chunk in self._find_masters()
        ]
        self.begin()

    def begin(self) -> None:
        """The average is the masters as they are now."""
        for own, master in zip(self.chunks(), self._find_masters(), strict=True):
            own.tensor.copy_(master.tensor)

    def take(self) -> None:
        """The masters have been updated. Waits for the average before, and for a copy of the masters."""
        if self._decay is not None:
            self.settle()
            self._work = self._thread.submit(self._average, self._staging.take(self._find_masters()))

    def settle(self) -> None:
        """Returns when nothing is under way."""
        if self._work is not None:
            self._work.result()
            self._work = None

    def chunks(self) -> list[Chunk]:
        """``ema/<parameter>``: the average itself, placed as the engine's masters are."""
        self.settle()
        return self._chunks

    def _find_masters(self) -> list[Chunk]:
        if self._decay is None:
            return []
        return [chunk for chunk in self._engine.state().chunks if chunk.name.startswith(MASTER)]

    @torch.no_grad()
    def _average(self, masters: list[Chunk]) -> None:
        assert self._decay is not None
        for own, master in zip(self._chunks, masters, strict=True):
            own.tensor.lerp_(master.tensor, 1 - self._decay)
