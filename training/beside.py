"""Collectives beside the computation: sums while a backward runs, copies while the next forward does.

    sums      launch 0   launch 1, complete 0   launch 2, complete 1  ...     one order, two under way at most
    copies    launch 0, 1, 2, ...      complete 0, 1 ... as somebody comes to read them

Sums over gloo are launched and completed by a thread, so that no backward waits; on a device by a stream of their own.
Copies over gloo have the memory that they arrive in and are launched at once; on a device, where a backend may need
room, as many at a time as ``AHEAD`` says.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from threading import Thread
from weakref import finalize

import torch

from parallel.doing import Doing
from parallel.reduce import Finish

AHEAD = 2  # copies under way on a device

Start = Callable[[], Finish]  # launches a collective; what it returns completes it
Task = tuple[Future[None], Callable[[], None]]


class Beside:
    """Runs collectives in the order of their launches, never more than two under way."""

    def __init__(self, device: torch.device) -> None:
        self._before: Finish | None = None
        self._launched = False  # since the last flush
        self._under_way: list[Future[None]] = []
        self._tasks: SimpleQueue[Task | None] | None = None  # of the thread, which starts with the first
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def launch(self, start: Start) -> None:
        """Launches a collective behind those before it, and completes all of these but one. Returns at once.

        On a device, it sees what the current stream has been given until now.
        """
        self._launched = True
        self._submit(partial(self._follow, start))

    def flush(self) -> None:
        """The last one completes as well."""
        if self._launched:
            self._submit(partial(self._follow, None))
        self._launched = False

    def wait(self) -> None:
        """Until all are complete; on a device, for what its current stream is given from now on.

        Raises what a collective raised.
        """
        self.flush()
        with Doing(waiting=True):
            for done in self._under_way:
                done.result()
        self._under_way.clear()
        if self._stream is not None:
            torch.accelerator.current_stream(self._stream.device).wait_stream(self._stream)

    def _submit(self, run: Callable[[], None]) -> None:
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._stream.device))
            with self._stream:
                run()
            return
        if self._tasks is None:
            self._tasks = SimpleQueue()
            # A daemon: a rank that fails while others owe it a summand must end, and not wait for them.
            Thread(target=_serve, args=(self._tasks,), name="gradients", daemon=True).start()
            finalize(self, self._tasks.put, None)
        done: Future[None] = Future()
        self._under_way.append(done)
        self._tasks.put((done, run))

    @torch.no_grad()
    def _follow(self, start: Start | None) -> None:
        before, self._before = self._before, None
        launched = None if start is None else start()
        if before is not None:
            before()
        self._before = launched


class Ahead:
    """Collectives under way that are completed in their order, as far as somebody needs them."""

    def __init__(self, device: torch.device) -> None:
        self._limit = None if device.type == "cpu" else AHEAD
        self._left: deque[Start] = deque()
        self._under_way: deque[Finish] = deque()
        self._done = 0

    def launch(self, starts: Sequence[Start]) -> None:
        """Launches collectives number 0, 1, ...; all of the last time are complete."""
        assert not self._under_way
        self._left.extend(starts)
        self._done = 0
        self._fill()

    def wait(self, last: int | None = None) -> None:
        """Until all up to number ``last`` are complete; without a number, all."""
        with Doing("weights of other holders"):
            while self._under_way and (last is None or self._done <= last):
                self._under_way.popleft()()
                self._done += 1
                self._fill()

    def _fill(self) -> None:
        while self._left and (self._limit is None or len(self._under_way) < self._limit):
            self._under_way.append(self._left.popleft()())


def _serve(tasks: SimpleQueue[Task | None]) -> None:
    """The thread: one task after the other. It holds none while it waits for the next."""
    while _run(tasks.get()):
        pass


def _run(task: Task | None) -> bool:
    if task is None:
        return False
    done, run = task
    try:
        run()
    except BaseException as error:  # whoever waits for it raises it
        done.set_exception(error)
    else:
        done.set_result(None)
    return True
