"""Shares shards out to worker processes and collects what they send back."""

import json
import os
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from training.data.listing import ShardPlan

ROOT = Path(__file__).parents[2]  # where the rooms are importable from
Worker = subprocess.Popen[str]
Mailbox = SimpleQueue[tuple[Worker, dict[str, Any] | None]]


def make_shards(setup: dict[str, Any], plans: Sequence[ShardPlan], workers: int | None) -> Generator[dict[str, Any]]:
    """Has ``plans`` made by up to ``workers`` processes, or one for each core; yields their messages as they come
    (training/data/worker.py). Closing the iterator ends the processes.

    Raises:
        ValueError: a worker met a mistake that the user can mend, or died.
    """
    workers = workers or len(os.sched_getaffinity(0))
    mailbox: Mailbox = SimpleQueue()
    waiting = (plan._asdict() for plan in plans)
    crew: list[Worker] = []
    left = len(plans)
    try:
        for _ in range(min(workers, left)):
            crew.append(_start(mailbox))
            _hand(crew[-1], setup)
            _hand(crew[-1], next(waiting))
        while left:
            worker, message = mailbox.get()
            if message is None and _is_dismissed(worker):
                continue
            if message is None:
                raise ValueError(
                    f"data.workers={workers}: a process ended with code {worker.wait()} (out of memory? fewer need "
                    "less); run again to continue"
                )
            if "error" in message:
                raise ValueError(message["error"])
            if "shard" in message:
                left -= 1
                _hand(worker, next(waiting, None))
            yield message
    finally:
        for worker in crew:
            worker.terminate()
            _hand(worker, None)
            worker.wait()


def _start(mailbox: Mailbox) -> Worker:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # In a process group of its own: Ctrl-C is for the process that asks, which then ends its workers.
    worker = subprocess.Popen(
        [sys.executable, "-m", "training.data.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        process_group=0,
    )
    Thread(target=_listen, args=(worker, mailbox), daemon=True).start()
    return worker


def _listen(worker: Worker, mailbox: Mailbox) -> None:
    assert worker.stdout
    with worker.stdout as lines:
        for line in lines:
            mailbox.put((worker, json.loads(line)))
    mailbox.put((worker, None))


def _hand(worker: Worker, task: dict[str, Any] | None) -> None:
    """Gives a worker its next task, or dismisses it. Where it has died, the mailbox says so."""
    assert worker.stdin
    with suppress(BrokenPipeError):
        if task is None:
            worker.stdin.close()
        else:
            print(json.dumps(task), file=worker.stdin, flush=True)


def _is_dismissed(worker: Worker) -> bool:
    return worker.stdin is None or worker.stdin.closed
