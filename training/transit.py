"""Buckets in transit: sums of gradients inside the backward, copies of new weights inside the next forward.

    sums     buckets of one stage alone: from the model's end to its beginning, as a backward makes gradients; in the
             stage's last backward each starts as soon as it and all before it are complete (training/countdown.py)
             of several stages: when the last of these is finished (``Waiting``)
    copies   launched from the model's beginning to its end, as a forward reads them; every call waits for the buckets
             that it reads, and for those before them (training/readers.py); ``settle`` waits for all

The order depends on names and sizes alone, and a bucket has the same place in it on all of its holders. So ranks of a
group start the same sums in the same order, and across groups no two ranks can wait for each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from parallel.doing import Doing
from parallel.reduce import Finish
from training.beside import Ahead, Beside, Start
from training.countdown import Countdown
from training.engine import Share, Waiting
from training.readers import find_readers
from training.slab import Bucket


class Travel(NamedTuple):
    """When a bucket was under way: launched, and known to be complete. Seconds of ``time.perf_counter``."""

    what: str  # "sum" or "copy"
    bucket: int  # its first parameter, counted through the stages
    start: float
    end: float


class Journal:
    """What was under way when, for whoever sets ``travels`` to a list."""

    def __init__(self) -> None:
        self.travels: list[Travel] | None = None

    def enter(self, start: Start, what: str, bucket: int) -> Start:
        """``start``, entered once it is complete."""
        travels = self.travels
        if travels is None:
            return start

        def launch() -> Finish:
            began, finish = perf_counter(), start()

            def complete() -> None:
                finish()
                travels.append(Travel(what, bucket, began, perf_counter()))

            return complete

        return launch


class Sums:
    """The sums of a rank's gradients over their holders, step by step."""

    def __init__(self, shares: Iterable[Share[Bucket]], stages: Iterable[int], device: torch.device) -> None:
        # Those of one stage alone come first: they may start before all of a stage's do.
        self._shares = sorted(shares, key=lambda share: (share.is_shared(), -share.of.first))
        self._queues: dict[int, list[Bucket]] = {stage: [] for stage in stages}
        for share in self._shares:
            if not share.is_shared() and share.of.slab.degree > 1:
                self._queues[share.users[0]].append(share.of)
        self._countdowns = {stage: Countdown([b.parameters for b in queue]) for stage, queue in self._queues.items()}
        self._stages = {
            parameter: stage
            for stage, queue in self._queues.items()
            for bucket in queue
            for parameter in bucket.parameters
        }
        self.waiting, self._beside = Waiting(self._queues), Beside(device)
        self.journal = Journal()

    def begin(self) -> None:
        """A step begins: what the last one has left under way is complete first."""
        self.settle()
        self.waiting.begin()
        for countdown in self._countdowns.values():
            countdown.begin()

    def take(self, parameter: nn.Parameter) -> None:
        """A gradient of ``parameter`` has been added up."""
        stage = self._stages.get(parameter)
        if stage is not None:
            self._set_off([self._queues[stage][number] for number in self._countdowns[stage].take(parameter)])

    def open(self, stage: int, coming: Iterable[Tensor] | None = None) -> None:
        """The last backward of ``stage`` begins, or the gradients ``coming`` that it has put off."""
        self._set_off([self._queues[stage][number] for number in self._countdowns[stage].open(coming)])

    def close(self, stage: int) -> None:
        """The last gradient of ``stage`` is there: starts what has not started."""
        self._countdowns[stage].close()
        self._set_off([bucket for bucket in self.waiting.finish(stage, self._shares) if not bucket.is_started()])
        self._beside.flush()

    def settle(self) -> None:
        """Until all that have started are complete."""
        with Doing("gradients of other holders"):
            self._beside.wait()

    def _set_off(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            start = bucket.close()
            if bucket.slab.degree > 1:
                self._beside.launch(self.journal.enter(start, "sum", bucket.first))


class Copies:
    """The copies of a rank's new weights to their holders."""

    def __init__(self, buckets: Iterable[Bucket], stages: Mapping[int, nn.Module], device: torch.device) -> None:
        """Puts itself before every call in ``stages`` that reads parameters which others hold too."""
        self._buckets = sorted((b for b in buckets if b.slab.degree > 1), key=lambda bucket: bucket.first)
        self._ahead, self.journal = Ahead(device), Journal()
        number = {parameter: n for n, bucket in enumerate(self._buckets) for parameter in bucket.parameters}
        for stage in stages.values():
            for module, parameters in find_readers(stage):
                last = max((number[p] for p in parameters if p in number), default=None)
                if last is not None:
                    module.register_forward_pre_hook(partial(self._wait_for, last))

    def launch(self) -> None:
        """Starts them all. Returns at once; what a rank owns is not to change before they are complete."""
        self._ahead.launch([self.journal.enter(bucket.publish, "copy", bucket.first) for bucket in self._buckets])

    def settle(self) -> None:
        """Until all are complete."""
        self._ahead.wait()

    def _wait_for(self, last: int, *_: object) -> None:
        self._ahead.wait(last)
