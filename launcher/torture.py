"""``shoestring torture``: runs that are killed, stopped, cut off and lied to, and come out as if nothing had been.

    shoestring torture run=tiny faults=20 seed=1

First a run that nothing disturbs; then the same run as often as it takes for all faults, about ``faults_a_run`` each,
started like any other. Every fault is drawn (launcher/campaign.py), happens (training/health/faults.py), has to be
noticed by name, and every loss and every evaluation has to be that of the undisturbed run, to the bit.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from configs.schema import RunConfig
from launcher import campaign, cli, ranks
from launcher.campaign import Result
from launcher.invocation import Invocation
from launcher.ordeal import read_marks, read_rows, start
from parallel.config import ParallelConfig

SUMMARY = "put a run through faults, and compare every loss with that of the undisturbed run"
# Unless the command says otherwise: short steps, many checkpoints, nobody waited for longer than seconds.
WORDS = (
    *("run.steps=40", "run.micro_batch=2", "run.eval_every=20", "run.eval_tokens=4096", "run.sample.tokens=0"),
    *("run.threads=1", "run.compile=off", "run.restarts=1000", "verify=skip", "checkpoint.every=3"),
    *("checkpoint.minutes=null", "checkpoint.save=false", "health.heartbeat=0.5", "health.hang=6", "health.window=2"),
    *("health.verify_every=1", "checkpoint.resume=auto"),
)
LAYOUT = ("parallel.dp=2", "parallel.ep=2")  # where the command names none


@dataclass(kw_only=True, slots=True)
class Keys:
    """What the run is put through."""

    faults: int = 20  # at least so many
    faults_a_run: int = 8  # about so many
    seed: int = 0  # of what is drawn

    def __post_init__(self) -> None:
        for name in ("faults", "faults_a_run"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints a line for each fault, as its run ends. Exit code 0 if all came out well, else 1."""
    from launcher.compose import Composer  # Hydra takes a fifth of a second to load

    keys: Keys = invocation.keys
    words = [*WORDS, *(LAYOUT if config.parallel == ParallelConfig() else ()), *invocation.overrides]
    presets = () if invocation.presets is None else (f"--config-dir={invocation.presets}",)
    composed = Composer(None if invocation.presets is None else Path(invocation.presets)).compose(tuple(words))[0]
    topology = ranks.check_layout(composed, None)
    root = Path(config.run.folder) / time.strftime("torture-%Y%m%d-%H%M%S")
    random = Random(keys.seed)  # noqa: S311
    drawn = campaign.draw(keys.faults, topology.world, topology.ep > 1, random)
    runs = campaign.share(drawn, composed.run.steps, keys.faults_a_run)
    print(f"{len(drawn)} faults in {len(runs)} runs of {composed.run.steps} steps; all is kept in {root}", flush=True)
    words += presets
    if (place := composed.checkpoint.folder) is not None:
        words.append(f"checkpoint.folder={place}/{root.name}")  # runs of every campaign have the same ids
    start(root, "undisturbed", words, ())
    expected = read_rows(root / "undisturbed")
    results: list[tuple[Result, bool]] = []
    print(HEAD, flush=True)
    for number, faults in enumerate(runs):
        name = f"{number:03}"
        lines = start(root, name, words, faults)
        same = read_rows(root / name) == expected
        for result in campaign.judge(faults, read_marks(root / name, faults), lines):
            results.append((result, same))
            print(_write(len(results), result, same), flush=True)
    return _conclude(results)


HEAD = f"{'':>4} {'rank':>4} {'step':>4}  {'phase':<11}{'kind':<8}{'again':>5} {'s':>6}  {'losses':<10}noticed"


def _write(number: int, result: Result, same: bool) -> str:
    fault = result.fault
    again = "" if result.again is None else str(result.again)
    seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
    said = result.noticed or ("NOT NOTICED" if result.happened else "NEVER HAPPENED")
    return (
        f"{number:>4} {fault.rank:>4} {fault.step:>4}  {fault.phase:<11}{fault.kind:<8}{again:>5} {seconds:>6}  "
        f"{'same bits' if same else 'DIFFERENT':<10}{said.removeprefix('shoestring: ')[:110]}"
    )


def _conclude(results: Sequence[tuple[Result, bool]]) -> int:
    well = sum(same and bool(result.noticed) for result, same in results)
    kinds = {result.fault.kind for result, _ in results if result.happened}
    phases = {result.fault.phase for result, _ in results if result.happened}
    print(
        f"{well} of {len(results)} faults were noticed and left every loss as it was: {len(kinds)} kinds in "
        f"{len(phases)} phases"
    )
    return int(well < len(results))


if __name__ == "__main__":
    sys.exit(cli.main(["torture", *sys.argv[1:]]))
