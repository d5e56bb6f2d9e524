"""``shoestring submit``: composes a run once, checks it whole, keeps it in a folder, and hands a job to Slurm.

    words -> RunConfig -> validate -> runs/<id>/ config.yaml, command.txt, versions.json, job.sbatch -> sbatch
    --multirun                        runs/<id>/ for each, runs/<name>-<time>-array/ job.sbatch, 0, 1, ... -> one array

The folder of an array has a link to each of its runs, named by element: so Slurm's output finds its run, and the script
of thousand runs is as short as that of one. A job waits, runs, waits again: the folder stays, each attempt reads it.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from configs.cluster import Scheduler
from configs.schema import RunConfig
from launcher import cli, discover, folder, gate, mistakes, ranks
from launcher.invocation import Invocation
from launcher.slurm import batch, chain, jobs, queue, script

SUMMARY = "submit a run, or with --multirun an array of runs, to Slurm; --dry-run shows what would be"
SCRIPT = "job.sbatch"


def run_all(made: list[tuple[RunConfig, Invocation]]) -> int:
    """Submits the runs, several as one array. Exit code 2 if one has a mistake, 1 if a layout's proof failed; then
    nothing is left behind."""
    _, invocation = made[0]
    discover.refuse("submit", os.environ)
    if found := list(_find_mistakes([each for each, _ in made])):
        mistakes.report(found)
        return cli.MISTAKE
    if invocation.dry_run:
        return _show([each for each, _ in made])
    try:
        return _submit(made)
    except queue.SlurmError as error:
        raise ValueError(f"no job was submitted: {error}; --dry-run shows the script") from None
    except gate.UnprovedError as error:
        print(error, file=sys.stderr)
        return 1


def _find_mistakes(configs: list[RunConfig]) -> Iterator[str]:
    if any(config.cluster.scheduler is not Scheduler.slurm for config in configs):
        yield "cluster=local must be cluster=slurm, or a preset of yours for a cluster: who else takes a job?"
        return
    if any(config.cluster != configs[0].cluster for config in configs):
        yield "--multirun must leave cluster.* as it is: an array has the same nodes for all of its runs"
        return
    yield from dict.fromkeys(mistake for config in configs for mistake in mistakes.find_mistakes(config))
    root = Path(configs[0].run.folder).absolute()
    try:
        script.write_pattern(root, "")
        script.write_pattern(Path.cwd(), "")
    except ValueError as error:
        yield str(error)


def _show(configs: list[RunConfig]) -> int:
    """Prints the script, and what Slurm says of it."""
    job = batch.write(configs, folder.locate(configs[0]) if len(configs) == 1 else batch.name_array(configs[0]))
    print(job.text, end="", flush=True)
    if not queue.is_there():
        print("# sbatch is not on this machine: nobody was asked whether the cluster takes this job", flush=True)
        return 0
    try:
        taken, answer = queue.try_out(job.text, job.options)
    except queue.SlurmError as error:
        raise ValueError(f"Slurm could not be asked: {error}") from None
    if not taken:
        raise ValueError(f"Slurm would refuse the job: {answer}")
    print(f"# Slurm says: {answer}", flush=True)
    return 0


def _submit(made: list[tuple[RunConfig, Invocation]]) -> int:
    """Makes the folders, keeps the script there, and submits it; takes away again what is new if Slurm refuses."""
    if not queue.is_there():
        raise queue.SlurmError("sbatch is not on this machine: Slurm's commands are on a cluster's login nodes")
    with ExitStack() as undo:
        runs: list[Path] = []
        for config, invocation in made:
            proof = gate.admit(config, ranks.check_layout(config, None), invocation)
            path, there = chain.open_folder(config, invocation, proof)
            runs.append(path)
            if not there:
                undo.callback(folder.discard_unstarted, path)
        place = runs[0]
        if len(runs) > 1:
            place = batch.link(batch.name_array(made[0][0]), runs)
            undo.callback(shutil.rmtree, place)
        job = batch.write([config for config, _ in made], place)
        (place / SCRIPT).write_text(job.text, encoding="utf-8")
        number = queue.submit(place / SCRIPT, job.options)
        undo.pop_all()
    for element, (path, (_, invocation)) in enumerate(zip(runs, made, strict=True)):
        jobs.keep(path, number if len(runs) == 1 else f"{number}_{element}", invocation.command)
    _tell(number, runs, place)
    return 0


def _tell(number: str, runs: list[Path], place: Path) -> None:
    if len(runs) > 1:
        print(f"job {number}, an array of {len(runs)} runs: {place}")
        print(f"how they stand:      shoestring runs folder={shlex.quote(str(runs[0].parent))}")
        return
    print(f"job {number} of run {place}")
    rows = {"how it stands": "status", "what its ranks say": "logs", "to end it": "cancel"}
    name = shlex.quote(place.name if place.parent == Path("runs") else str(place))
    for what, verb in rows.items():
        print(f"{what + ':':<20} shoestring {verb} {name}{' follow=true' if verb == 'logs' else ''}")


if __name__ == "__main__":
    sys.exit(cli.main(["submit", *sys.argv[1:]]))
