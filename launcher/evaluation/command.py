"""``shoestring eval <run or checkpoint>``: the loss of kept weights on texts by name, in any layout.

shoestring eval mine                                         what the run holds out, as its own evaluations read it
shoestring eval mine sets.wiki=texts/wiki sets.code=src tokens=0           other texts, all of each
shoestring eval mine step=500 parallel.pp=2 parallel.dp=2 parallel.ep=2    on ranks that are started here
torchrun --nproc-per-node 8 -m launcher.evaluation mine parallel.tp=8      or by torchrun, srun or mpirun
shoestring eval mine tasks=[arc_easy]                                      by lm-eval's harness (tasks.py)
"""

import os
import shutil

from configs.schema import RunConfig
from launcher import ranks
from launcher.discover import discover
from launcher.evaluation import job
from launcher.evaluation.config import Config
from launcher.evaluation.find import Found, find
from launcher.evaluation.layout import lay_out
from launcher.invocation import Invocation

__all__ = ["Config"]
SUMMARY = "measure a run's weights on held-out or other texts, in any layout, or by tasks of lm-eval's harness"
ARGUMENTS = ("run",)


def run(config: Config, invocation: Invocation) -> int:
    """Prints a table and keeps it in the run's folder. Exit code 1 where a rank died."""
    found = find(invocation.arguments[0], config)
    if config.tasks:
        from launcher.evaluation.tasks import answer

        return answer(found, config)
    rank = discover(os.environ)
    topology = ranks.arrange_ranks(config.parallel, None if rank is None else rank.world)
    mine = lay_out(found.config, config, topology)
    tokens = found.config.run.eval_tokens if config.tokens is None else config.tokens
    request = job.Request(found.kept, config.sets, tokens)
    if rank is not None:
        from launcher.member import join

        join(mine, rank, lambda _: job.make(found.home, mine, request))
        return 0
    return _start(mine, found, request, topology.world)


def _start(mine: RunConfig, found: Found, request: job.Request, world: int) -> int:
    """On this machine, with ranks of its own."""
    path = job.make(found.home, mine, request)
    try:
        if world == 1:
            from training.machine import join_mesh

            with join_mesh(mine) as mesh:
                job.serve(mesh, mine, path, request)
            return 0
        from launcher import agent

        code = agent.start(path, world)
    except BaseException:
        shutil.rmtree(path)
        raise
    if code == 0:
        shutil.rmtree(path / "logs", ignore_errors=True)  # else the report says where they are
    return code
