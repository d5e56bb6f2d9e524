"""Runs a function on several gloo ranks of this machine, in a fraction of a second.

    parent --- fork server (torch and our rooms loaded once) --- rank 0, rank 1, ... --- file store in a fresh folder

No port is chosen. The parent waits for what each rank sends: its value, or its exception. At the first failure, and
after ``timeout``, every rank writes the stacks of its threads, the parent puts them into its own error, and all ranks
are killed. A rank whose parent is gone ends by itself.
"""

import faulthandler
import gc
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from configs.network import NetworkConfig

GRACE = 1.0  # seconds that ranks have to write their stacks
LAST = 20  # lines of a rank's output shown with a failure


class RankError(Exception):
    """A rank raised, ended or hung. The message holds its traceback, and what every other rank was doing."""


class Answer(NamedTuple):
    """What a rank sends, once."""

    rank: int
    time: float  # monotonic, one clock for all ranks
    value: Any
    error: str | None  # traceback


def run_ranks(function: Callable[..., Any], world: int, *args: Any, timeout: float = 240) -> list[Any]:
    """``function(rank, world, *args)`` on ``world`` ranks -> what each returned, by rank.

    ``function`` is importable; values and arguments are copied between processes. Raises RankError.
    """
    context = multiprocessing.get_context("forkserver")
    _start_server()
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder, processes, channels = Path(name), [], []
        try:
            for rank in range(world):
                channel, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_serve, args=(rank, world, folder, timeout, theirs, work), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                channels.append(channel)
            return _collect(processes, channels, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _start_server() -> None:
    """Starts the fork server, if there is none. It imports from where this process does, which is not of itself so."""
    multiprocessing.set_forkserver_preload(["preloaded"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        multiprocessing.forkserver.ensure_running()


def _collect(processes: list[BaseProcess], channels: list[Connection], folder: Path, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    answers: dict[int, Answer] = {}
    while len(answers) < len(channels):
        open_channels = [channel for rank, channel in enumerate(channels) if rank not in answers]
        ready = wait(open_channels, max(0.0, deadline - time.monotonic()))
        fresh = [_receive(channels.index(channel), channel) for channel in ready]  # type: ignore[arg-type]
        answers |= {answer.rank: answer for answer in fresh}
        failed = [answer for answer in fresh if answer.error is not None]
        if failed:
            failed += _receive_late(channels, answers)
        if failed or not ready:
            raise RankError(_explain(failed, answers, processes, folder, timeout))
    return [answers[rank].value for rank in range(len(channels))]


def _receive_late(channels: list[Connection], answers: dict[int, Answer]) -> list[Answer]:
    """Further failures within a moment: a rank that is killed closes its connections one by one, its pipe not first."""
    deadline = time.monotonic() + GRACE / 5
    late = []
    while open_channels := [channel for rank, channel in enumerate(channels) if rank not in answers]:
        ready = wait(open_channels, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        fresh = [_receive(channels.index(channel), channel) for channel in ready]  # type: ignore[arg-type]
        answers |= {answer.rank: answer for answer in fresh}
        late += [answer for answer in fresh if answer.error is not None]
    return late


def _receive(rank: int, channel: Connection) -> Answer:
    try:
        return pickle.loads(channel.recv_bytes())  # noqa: S301 (a rank of ours wrote it)
    except EOFError:
        # Before any other failure: it ended some time ago, and what others say may have come of that.
        return Answer(rank, 0.0, None, "ended without an answer\n")


def _explain(
    failed: list[Answer], answers: dict[int, Answer], processes: list[BaseProcess], folder: Path, timeout: float
) -> str:
    """The first failure, then what the ranks that had not answered were doing."""
    lines = []
    if failed:
        first = min(failed, key=lambda answer: answer.time)
        lines.append(f"rank {first.rank} of {len(processes)} failed:\n{first.error}{_output(folder, first.rank)}")
    else:
        lines.append(f"no answer after {timeout:g} s from ranks {sorted(set(range(len(processes))) - set(answers))}")
    waiting = [rank for rank, process in enumerate(processes) if rank not in answers and process.is_alive()]
    for rank in waiting:
        if _ready(folder, rank):
            os.kill(processes[rank].pid or 0, signal.SIGUSR1)
    time.sleep(GRACE / 10)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and not all(_stack(folder, rank) for rank in waiting):
        time.sleep(0.01)
    for rank in waiting:
        lines.append(f"rank {rank} was here:\n{_stack(folder, rank) or 'not started'}\n{_output(folder, rank)}")
    return "\n".join(lines)


def _ready(folder: Path, rank: int) -> bool:
    return (folder / f"{rank}.stack").exists()


def _stack(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.stack"
    return path.read_text() if path.exists() else ""


def _output(folder: Path, rank: int) -> str:
    path = folder / f"{rank}.log"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return "\n".join([f"its output: {line}" for line in lines[-LAST:]])


def _serve(rank: int, world: int, folder: Path, timeout: float, channel: Connection, work: bytes) -> None:
    """A rank's life."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    with (folder / f"{rank}.stack").open("w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            answer = Answer(rank, time.monotonic(), _run(rank, world, folder, timeout, work), None)
        except BaseException:
            answer = Answer(rank, time.monotonic(), None, traceback.format_exc())
        channel.send_bytes(pickle.dumps(answer))
        faulthandler.unregister(signal.SIGUSR1)


def _run(rank: int, world: int, folder: Path, timeout: float, work: bytes) -> Any:
    import torch
    import torch.distributed as dist

    gc.freeze()  # what was preloaded is no garbage: DeepSpeed's stage 3 would go through it over and over
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ["TORCH_FR_BUFFER_SIZE"] = str(NetworkConfig().trace)  # as every rank of a run has it
    function, args = pickle.loads(work)  # noqa: S301 (the parent wrote it)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    value = function(rank, world, *args)
    # A rank that left early would break a collective that another is still in.
    dist.barrier()
    dist.destroy_process_group()
    return value


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
