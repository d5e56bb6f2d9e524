"""A handle on what is under way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch.distributed as dist

from parallel.doing import Doing

Result = TypeVar("Result")
Next = TypeVar("Next")


@dataclass(frozen=True, slots=True)
class Pending(Generic[Result]):
    """A collective under way."""

    works: tuple[dist.Work, ...]
    finish: Callable[[], Result]

    def wait(self) -> Result:
        """The result, once it is there. To be called once."""
        with Doing(waiting=True):
            for work in self.works:
                work.wait()
        return self.finish()

    def then(self, step: Callable[[Result], Next]) -> "Pending[Next]":
        """The same under way, with ``step`` taken once it is there."""
        return Pending(self.works, lambda: step(self.finish()))
