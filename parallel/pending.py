"""A handle on what is under way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")
Next = TypeVar("Next")


@dataclass(frozen=True, slots=True)
class Pending(Generic[Result]):
    """A collective under way."""

    work: dist.Work | None
    finish: Callable[[], Result]

    def wait(self) -> Result:
        """The result, once it is there. To be called once."""
        if self.work is not None:
            self.work.wait()
        return self.finish()

    def then(self, step: Callable[[Result], Next]) -> "Pending[Next]":
        """The same under way, with ``step`` taken once it is there."""
        return Pending(self.work, lambda: step(self.finish()))
