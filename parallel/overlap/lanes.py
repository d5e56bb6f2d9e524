"""Lanes: what is sent beside what is computed, and what makes one wait for the other.

    InOrder    a CPU: a collective is handed to the backend's threads as it starts, and waited for where it lands
    Streams    a GPU: what packs, sends and unpacks rows runs on a stream of its own. It begins behind what the compute
               stream has been given so far; the compute stream goes on behind it from where it lands

Whoever is about to wait on a lane calls its ``idle`` first, which does what nobody waits for, if there is any: weight
gradients that were put off (parallel/overlap/backlog.py).

Over streams that keep books, ``Streams`` proves that whatever one reads of the other's was waited for:
parallel/overlap/record.py.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from parallel.config import check_multiprocessors
from parallel.pending import Pending

T = TypeVar("T")
Start = Callable[..., Pending[T]]  # of the tensors that are sent
Idle = Callable[[int | None], None]  # does something; not None: so many things at most


class Lanes(Protocol):
    """A compute lane, which is the caller's, and a communication lane."""

    idle: Idle

    def start(self, start: Start[T], *tensors: Tensor) -> Pending[T]:
        """``start(*tensors)`` on the communication lane; the result, once waited for, is the compute lane's."""
        ...


def rest(most: int | None = None) -> None:
    """Does nothing: the ``idle`` of lanes that have nothing to do."""


class InOrder:
    """One processor: whatever is started has started."""

    def __init__(self) -> None:
        self.idle: Idle = rest

    def start(self, start: Start[T], *tensors: Tensor) -> Pending[T]:
        """See ``Lanes``."""
        return start(*tensors)


class Streams:
    """A stream for communication beside the current one. It has never run on a GPU.

    ``module``: what makes streams and knows the current one, as ``torch.cuda`` does.
    """

    def __init__(self, module: Any) -> None:
        # Ahead of products in the queue: a few blocks that keep the network busy, not many that keep it waiting.
        self._module, self._stream = module, module.Stream(priority=-1)
        self.idle: Idle = rest

    def start(self, start: Start[T], *tensors: Tensor) -> Pending[T]:
        """See ``Lanes``."""
        self._stream.wait_stream(self._module.current_stream())
        with self._module.stream(self._stream):
            pending = start(*tensors)
        # The allocator gives their memory to nobody else before this stream is done with them.
        _hold(tensors, self._stream)

        def land() -> T:
            with self._module.stream(self._stream):
                result = pending.wait()
            here = self._module.current_stream()
            here.wait_stream(self._stream)
            _hold(result, here)
            return result

        return Pending((), land)


def choose_lanes(device: torch.device) -> Lanes:
    """The lanes of a rank on ``device``."""
    return InOrder() if device.type == "cpu" else Streams(torch.get_device_module(device))


def reserve(multiprocessors: int, device_type: str) -> None:
    """Leaves so many of a GPU to communication: products whose kernels can be told so start on the others only.

    torch's carve-out; of its products those in FP8 heed it, on Hopper. What communication takes is the groups' to say:
    ``parallel.mesh.Mesh``. Raises ValueError where the device has none.
    """
    check_multiprocessors(multiprocessors, device_type)
    torch._C._set_sm_carveout_experimental(multiprocessors or None)


def _hold(tensors: Any, stream: Any) -> None:
    for tensor in tensors if isinstance(tensors, tuple) else (tensors,):
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":  # whose memory no stream gets back early
            tensor.record_stream(stream)
