"""``shoestring verify``: proves that a layout gives the plain model's numbers, before a run is trusted to it.

The configuration is shrunk to a few seconds of float64 on this machine's processor (training/proof/shrink.py) and
proved as docs/proof.md says. Ranks are forked from a server that has loaded torch once and meet through a file.
"""

import json
import multiprocessing
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.schema import RunConfig
from launcher import cli
from launcher.invocation import Invocation
from launcher.ranks import check_layout
from parallel.topology import Topology

SUMMARY = "prove that a layout gives the plain model's loss, gradients and weights; train nothing"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints a table for each case. Exit code 0 if all passed, 1 if one failed or a rank did."""
    topology = check_layout(config, None)
    from training.proof.shrink import shrink

    shrunk = shrink(config, topology)
    for line in shrunk.unproved:
        print(f"not proved  {line}")
    passed = True
    for name, case in shrunk.cases.items():
        print(f"{write_degrees(case.topology)}, engine {case.engine}, {name}", flush=True)
        verdict = start(case)
        print(verdict["table"], flush=True)
        passed = passed and verdict["passed"]
    print("the numbers are those of the plain model" if passed else "the numbers are NOT those of the plain model")
    return 0 if passed else 1


def write_degrees(topology: Topology) -> str:
    """The layout in words."""
    return " ".join(f"{axis}={getattr(topology, axis)}" for axis in ("dp", "tp", "ep"))


def start(case: Any) -> dict[str, Any]:
    """Runs a case on ranks of its own: whether it passed, and the table, or the exception of a rank."""
    from torch.multiprocessing.spawn import ProcessException, start_processes

    multiprocessing.set_forkserver_preload(["training.proof.prove", "torch._dynamo"])
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        try:
            start_processes(prove_rank, (case, folder), nprocs=case.topology.world, start_method="forkserver")
        except ProcessException as error:
            return {"passed": False, "table": str(error)}
        return dict(json.loads((Path(folder) / "verdict.json").read_text()))


def prove_rank(rank: int, case: Any, folder: str) -> None:
    """One rank of a proof; rank 0 writes the verdict."""
    import torch

    from parallel.mesh import Mesh, connect, disconnect
    from training.proof.prove import prove

    torch.set_num_threads(1)
    device = torch.device("cpu")
    connect(device, rank, case.topology.world, Path(folder) / "store")
    report = prove(case, Mesh(case.topology, device))
    if rank == 0:
        verdict = {"passed": report.passed, "table": str(report)}
        (Path(folder) / "verdict.json").write_text(json.dumps(verdict))
    disconnect()


if __name__ == "__main__":
    sys.exit(cli.main(["verify", *sys.argv[1:]]))
