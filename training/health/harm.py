"""What a fault does to the process that it happens in."""

import errno
import os
import signal
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch

from training.checkpoint import files, part
from training.health.config import FailAt, Fault, Phase

Variables = Mapping[str, Any]  # of the function in which it happens, ``rank``, and ``setup`` once a step has begun


class InjectedError(RuntimeError):
    """An exception that ``health.faults`` asked for."""


def harm(fault: FailAt, variables: Variables) -> None:
    """Does it; raises what it raises. Not for a slow rank, which is a matter of time."""
    if fault.kind in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.kind])
    elif fault.kind in DISK_FAULTS:
        code = DISK_FAULTS[fault.kind]
        fail_once(*USES[fault.phase], OSError(code, os.strerror(code), f"health.faults: {fault}"))
    elif fault.kind is Fault.error:
        raise InjectedError(f"health.faults asked for {fault}")
    else:
        CHANGES[fault.kind]({"rank": fault.rank, **variables})


def spoil_gradient(variables: Variables) -> None:
    """One value of the gradient that a parameter gets is no number."""
    gradient: torch.Tensor = variables["grad"]
    gradient.view(-1)[:1].fill_(torch.nan)


def flip_weight(variables: Variables) -> None:
    """A bit of a weight that the rank computes with."""
    parameters = [p for stage in variables["setup"].stages.values() for p in stage.parameters()]
    largest = max(parameters, key=torch.numel)
    content = largest.data.view(-1).view(torch.uint8)  # autograd, which counts changes, is not to count this one
    content[len(content) // 2] ^= 1


def spoil_checkpoint(variables: Variables) -> None:
    """A bit in the middle of a file of the checkpoint that is about to be loaded: the rank's own, which it reads next.
    Another rank may have read its own already.
    """
    folder: files.Place = variables["folder"]
    path = folder / files.name_file(variables["rank"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def fail_once(module: ModuleType, name: str, error: OSError) -> None:
    """The next call of a function, by those who know it as that of ``module``, raises ``error``."""
    function = getattr(module, name)

    def fail(*_: Any) -> None:
        setattr(module, name, function)
        raise error

    setattr(module, name, fail)


def cut_connections(variables: Variables) -> None:
    """All of this process, as when its machine is cut off: whoever talks to it sees them closed."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6):
                        connection.shutdown(socket.SHUT_RDWR)


def end_silently(variables: Variables) -> None:
    """The process is gone, and nobody has heard why."""
    os._exit(SILENT)


def compute_for_ever(variables: Variables) -> None:
    """The thread does not come back."""
    while True:
        signal.pause()


SILENT = 7  # an exit code
SIGNALS = {
    Fault.kill: signal.SIGKILL,
    Fault.term: signal.SIGTERM,
    Fault.segv: signal.SIGSEGV,
    Fault.stop: signal.SIGSTOP,
}
DISK_FAULTS = {Fault.full: errno.ENOSPC, Fault.write: errno.EIO}
USES = {Phase.writing: (files, "create"), Phase.committing: (part, "join")}  # what fails there
CHANGES: dict[Fault, Callable[[Variables], None]] = {
    Fault.nan: spoil_gradient,
    Fault.flip: flip_weight,
    Fault.corrupt: spoil_checkpoint,
    Fault.peer: cut_connections,
    Fault.exit: end_silently,
    Fault.stuck: compute_for_ever,
}
