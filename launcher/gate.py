"""What stands before a run of several ranks: a passed proof of its class of layout, or ``verify=skip``, and its log.

auto       a proof that is kept (launcher/proofs.py), else one that is made now, in seconds
require    a proof that is kept, else no run: for machines that are paid for by the second
skip       none; the terminal and the run's folder say so
"""

import shlex
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.schema import RunConfig, Verify
from launcher import proofs, trial
from launcher.invocation import Invocation
from parallel.config import ParallelConfig
from parallel.topology import Topology

if TYPE_CHECKING:
    from training.proof.shrink import Shrunk


class UnprovedError(Exception):
    """The layout does not give the plain model's numbers; the text is a report of what failed."""


def admit(config: RunConfig, topology: Topology, invocation: Invocation) -> dict[str, Any] | None:
    """What the folder of a run on ``topology`` keeps of its proof, which is made where it has to; None for one rank.

    Raises UnprovedError if the proof failed, ValueError with ``verify=require`` if none is kept, or for a layout that
    cannot be proved on one machine.
    """
    if topology.world == 1:
        return None
    layout = describe(topology, config.parallel)
    if config.verify is Verify.skip:
        print(f"verify=skip: {layout} starts without a proof", flush=True)
        return {"verify": "skip"}
    from training.proof.shrink import shrink

    shrunk = shrink(config, topology)
    folder, key = proofs.locate(config.proofs), proofs.identify(shrunk.cases)
    proof = proofs.find(folder, key)
    if proof is not None:
        print(f"{layout}: {proof.brief}", flush=True)
    elif config.verify is Verify.require:
        raise ValueError(
            f"verify=require: {layout} has no proof in {folder}; this makes one: {_command(topology, invocation)}"
        )
    else:
        print(f"{layout} has no proof yet: proving it ... ", end="", flush=True)
        proof = _prove(layout, shrunk, key, config)
    for line in shrunk.unproved:
        print(f"not proved  {line}", flush=True)
    return {"verify": str(config.verify), **proofs.write(proof), "unproved": shrunk.unproved}


def describe(topology: Topology, parallel: ParallelConfig) -> str:
    """A layout in words."""
    axes = ("pp", "dp", "tp", "ep") if topology.pp > 1 else ("dp", "tp", "ep")
    schedule = f", {parallel.name_schedule()}" if topology.pp > 1 else ""
    return f"{' '.join(f'{axis}={getattr(topology, axis)}' for axis in axes)}{schedule}, engine {parallel.engine}"


def _prove(layout: str, shrunk: "Shrunk", key: str, config: RunConfig) -> proofs.Proof:
    """Makes the proof and keeps it, and goes on with the line that was begun."""
    start = time.monotonic()
    verdicts = trial.start(shrunk.cases)
    seconds = time.monotonic() - start
    said, proof = settle(shrunk, key, verdicts, config)
    if proof is None:
        print(f"FAILED after {seconds:.1f} s", flush=True)
        raise UnprovedError(_report(layout, verdicts))
    print(f"passed in {seconds:.1f} s, {said}", flush=True)
    return proof


def settle(
    shrunk: "Shrunk", key: str, verdicts: Mapping[str, trial.Verdict], config: RunConfig
) -> tuple[str, proofs.Proof | None]:
    """Keeps the proof if it passed, else forgets an earlier one. Says where it is kept; None if it failed.

    ``key`` is the hash of the class before the proof: if it is another now, nobody knows what was proved.
    """
    folder = proofs.locate(config.proofs)
    if not all(verdict.passed for verdict in verdicts.values()):
        proofs.forget(folder, key)
        return "", None
    rows = {name: verdict.rows for name, verdict in verdicts.items()}
    proof = proofs.describe(key, shrunk.cases, rows, shrunk.unproved)
    if proofs.identify(shrunk.cases) != key:
        return "not recorded: the sources changed meanwhile", proof
    return proofs.keep(folder, proof), proof


def _report(layout: str, verdicts: Mapping[str, trial.Verdict]) -> str:
    """The failing rows, or the exception of a rank."""
    lines = [f"shoestring: {layout} does not give the plain model's numbers; no run was started"]
    for name, verdict in verdicts.items():
        if not verdict.passed:
            rows = str(verdict).splitlines()
            lines += [name, *(row for row in rows if not row.startswith("passed"))]
    return "\n".join([*lines, "docs/proof.md says what each row is; verify=skip trains without a proof"])


def _command(topology: Topology, invocation: Invocation) -> str:
    """The command that proves the layout, for a shell. A launcher's world becomes a degree."""
    words = [word for word in invocation.command[2:] if not word.startswith("verify=")]
    given = any(word.startswith("parallel.dp=") for word in words)
    return shlex.join(["shoestring", "verify", *words, *([] if given else [f"parallel.dp={topology.dp}"])])
