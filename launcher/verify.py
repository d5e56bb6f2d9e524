"""``shoestring verify``: proves that a layout gives the plain model's numbers, before a run is trusted to it.

The configuration is shrunk to a few seconds of float64 on this machine's processor (training/proof/shrink.py) and
proved as docs/proof.md says. A proof that passed is kept, and runs of its class of layout start with it.
"""

import os
import sys

from configs.schema import RunConfig
from launcher import cli, gate, proofs, ranks, trial
from launcher.discover import discover
from launcher.invocation import Invocation

SUMMARY = "prove that a layout gives the plain model's loss, gradients and weights; train nothing"


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints a table for each case. Exit code 0 if all passed, 1 if one failed or a rank did."""
    if (rank := discover(os.environ)) is not None:
        raise ValueError(
            f"this is rank {rank.rank} of {rank.world} that {rank.backend} started: shoestring verify starts ranks of "
            "its own; call it once, by itself, and give parallel.dp"
        )
    topology = ranks.check_layout(config, None)
    from training.proof.shrink import shrink

    shrunk = shrink(config, topology)
    for line in shrunk.unproved:
        print(f"not proved  {line}", flush=True)
    key = proofs.identify(shrunk.cases)
    verdicts = trial.start(shrunk.cases)
    for name, verdict in verdicts.items():
        case = shrunk.cases[name]
        print(f"{gate.describe(case.topology, case.parallel)}, {name}\n{verdict}")
    said, proof = gate.settle(shrunk, key, verdicts, config)
    print(
        "the numbers are NOT those of the plain model" if proof is None else "the numbers are those of the plain model"
    )
    if proof is not None:
        print(said)
    return 0 if proof else 1


if __name__ == "__main__":
    sys.exit(cli.main(["verify", *sys.argv[1:]]))
