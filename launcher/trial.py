"""The ranks of a proof: forked from a process that has loaded torch once, met through a file, gone with that process.

    this process --- a fresh one --- rank 0   writes what was found, case after case
                                 --- rank 1
                                 ...

The process between is there because a process with threads must not fork, and so that nothing stays in the memory of
whoever trains afterwards. Ranks use one thread each, of this machine's processor alone.
"""

import json
import logging
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from launcher.network import LOOPBACK
from training.proof.report import Report, Row

if TYPE_CHECKING:
    from training.proof.case import Case

PATIENCE = timedelta(minutes=5)  # that ranks wait for each other


class Verdict(NamedTuple):
    """What came of a case."""

    rows: tuple[Row, ...]  # none if a rank failed
    trouble: str  # the exception of the rank that did

    @property
    def passed(self) -> bool:
        return bool(self.rows) and Report(self.rows).passed

    def __str__(self) -> str:
        return str(Report(self.rows)) if self.rows else self.trouble


def start(cases: "Mapping[str, Case]") -> dict[str, Verdict]:
    """Proves cases of one topology, on as many ranks as it has."""
    with tempfile.TemporaryDirectory(prefix="proof-") as name:
        folder = Path(name)
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(tuple(cases.values()), folder))
        heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()  # deaf to Ctrl-C from its first line: this process ends it
        finally:
            signal.signal(signal.SIGINT, heard)
        try:
            process.join()
        finally:
            process.kill()
            process.join()
        said = folder / "trouble"
        trouble = said.read_text() if said.exists() else f"the ranks ended with exit code {process.exitcode}"
        verdicts = {}
        for number, name in enumerate(cases):
            verdicts[name] = _read(folder / f"{number}.json", trouble)
            trouble = "not proved: a rank had failed" if verdicts[name].trouble else trouble
        return verdicts


def _read(path: Path, trouble: str) -> Verdict:
    rows = json.loads(path.read_text()) if path.exists() else []
    return Verdict(tuple(Row(*row) for row in rows), "" if rows else trouble)


def serve(cases: "tuple[Case, ...]", folder: Path) -> None:
    """The process between: loads what the ranks need, forks them and keeps the exception of one that fails."""
    import torch._dynamo  # noqa: F401, AdamW would load it, in every rank
    from torch.multiprocessing.spawn import ProcessException, start_processes

    import training.proof.prove  # noqa: F401
    from training.engines import load_library

    for engine in {case.engine for case in cases}:
        load_library(engine, "cpu")
    logging.disable(logging.CRITICAL)  # torch tells of ranks that it ends: the exception says more
    os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK
    try:
        start_processes(prove_rank, (cases, folder), nprocs=cases[0].topology.world, start_method="fork")
    except ProcessException as error:
        (folder / "trouble").write_text(str(error))


def prove_rank(rank: int, cases: "tuple[Case, ...]", folder: Path) -> None:
    """One rank of a proof; rank 0 writes the verdicts."""
    import torch

    from parallel.mesh import Mesh, connect, disconnect
    from training.proof.prove import prove

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what it gets when the process between is gone
    torch.set_num_threads(1)
    device = torch.device("cpu")
    connect(device, rank, cases[0].topology.world, folder / "store", PATIENCE)
    mesh = Mesh(cases[0].topology, device, PATIENCE)
    for number, case in enumerate(cases):
        report = prove(case, mesh)
        if rank == 0:
            (folder / f"{number}.json").write_text(json.dumps(report.rows))
    disconnect()
