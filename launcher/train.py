"""``shoestring train``: a run from its configuration to its summary.

one process                 parallel.* asks for no more than one rank: trained here
its own ranks               it asks for more: launcher/gate.py asks for a proof, launcher/restarts.py starts them here
a rank of somebody else's   torchrun, srun or mpirun ... -m launcher.train: this process is one of several
"""

import os
import sys
from pathlib import Path

from configs.preflight import When
from configs.schema import RunConfig
from launcher import cli, folder, gate, ranks
from launcher.discover import discover
from launcher.invocation import Invocation
from parallel.topology import Topology
from training.checkpoint import fence

SUMMARY = "train a model: prepare the text, run the steps, save weights, metrics and a sample"
CODES = {"finished": 0, "interrupted": 130, "diverged": 1}


def run(config: RunConfig, invocation: Invocation) -> int:
    """Trains in a new run folder. Exit code 0; 130 after Ctrl-C; 1 if loss or gradient were not finite for too long, or
    if the layout's proof failed, without a folder."""
    if config.preflight.when is When.alone:
        raise ValueError("preflight.when=alone is what shoestring preflight does: take auto, start or never")
    rank = discover(os.environ)
    if rank is not None:
        from launcher.member import join

        def make(topology: Topology) -> Path:
            path = folder.create(config, invocation, gate.admit(config, topology, invocation))
            print(f"run {path}", flush=True)
            return path

        ending = join(config, rank, make)
        assert ending is not None
        return CODES[ending]
    topology = ranks.check_own(config)
    try:
        proof = gate.admit(config, topology, invocation)
    except gate.UnprovedError as error:
        print(error, file=sys.stderr)
        return 1
    path = folder.create(config, invocation, proof)
    print(f"run {path}", flush=True)
    try:
        # Both load torch: only once the configuration is known to be good.
        if topology.world > 1:
            from launcher import agent, restarts

            def begin(attempt: str) -> int:
                return agent.start(path, topology.world)

            code = restarts.start(path, begin, config.run.restarts, fence.name_attempt())
            return code or CODES[folder.RunFolder(path).ending or "diverged"]
        from launcher.member import serve_alone

        return CODES[serve_alone(config, path) or "diverged"]
    except BaseException:
        folder.discard_unstarted(path)
        raise


if __name__ == "__main__":
    code = cli.main(["train", *sys.argv[1:]])
    if discover(os.environ) is not None:
        from launcher.entry import leave

        leave(code)
    sys.exit(code)
