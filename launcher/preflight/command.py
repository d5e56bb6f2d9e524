"""``shoestring preflight``: the checks of ``shoestring train`` with the same words, and nothing else.

Its ranks are started as those of a run are, by itself or by torchrun. The table of all checks is printed, then who is
unfit, why and what to do. Nothing is left behind.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from configs.schema import RunConfig
from launcher import cli, folder, ranks
from launcher.discover import Rank, discover
from launcher.entry import enter
from launcher.invocation import Invocation
from launcher.preflight.unfit import UnfitError

SUMMARY = "check the machines that a run would have: devices, products, disk, clocks, collectives; train nothing"
# Of a run's configuration, what is this command's own: a folder that no run has, without earlier checkpoints.
OWN = ("preflight.when=alone", "run.name=preflight", "run.id=null", "checkpoint.resume=never", "verify=skip")


def run(config: RunConfig, invocation: Invocation) -> int:
    """Prints what was found. Exit code 0 where nothing was, 1 where something was or a rank has died."""
    from launcher.compose import Composer

    presets = Path(invocation.presets) if invocation.presets is not None else None
    words = (*invocation.overrides, *OWN)
    config, yaml = Composer(presets).compose(words)
    invocation = replace(invocation, overrides=words, yaml=yaml)
    rank = discover(os.environ)
    try:
        if rank is not None:
            return _join(config, rank, invocation)
        return _start(config, invocation)
    except UnfitError as error:
        if rank is None or rank.rank == 0:
            print(error, file=sys.stderr)
        return 1


def _join(config: RunConfig, rank: Rank, invocation: Invocation) -> int:
    """As a rank that somebody else has started."""
    from launcher.member import take_part

    made: list[Path] = []

    def make(_: object) -> Path:
        made.append(folder.create(config, invocation))
        return made[0]

    try:
        with enter(rank, config.network) as rank:
            take_part(config, rank, make)
    finally:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)
    return 0


def _start(config: RunConfig, invocation: Invocation) -> int:
    """On this machine, with ranks of its own."""
    world = ranks.check_own(config).world
    path = folder.create(config, invocation)
    try:
        code = _serve(config, path, world)
    except UnfitError:
        shutil.rmtree(path)
        raise
    if code == 0:
        shutil.rmtree(path)  # else the report says where the logs are
    return code


def _serve(config: RunConfig, path: Path, world: int) -> int:
    if world > 1:
        from launcher import agent

        return agent.start(path, world)
    from launcher.member import serve_alone

    serve_alone(config, path)
    return 0


if __name__ == "__main__":
    sys.exit(cli.main(["preflight", *sys.argv[1:]]))
