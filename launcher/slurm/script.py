"""The batch script of a job: slurm/train.sbatch with its blocks filled in. Pure: nothing is run or written.

    # >>> about        for whom the script is
    # >>> options      #SBATCH lines, in Slurm's own quoting         ``write_options``
    # >>> setup        cluster.setup, as the user wrote it
    # >>> run          folder and interpreter, in the shell's        ``shlex``

Three readers, three ways to quote. Slurm reads a line of options up to its end: words end at spaces, also at escaped
ones, so that a value stands in double quotes, in which a backslash protects the next character. Its names of files
have patterns, %j, besides. The shell sees two words of ours, quoted by ``shlex``. What is a text and has a line break
in it has been refused before (configs/cluster.py).
"""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.cluster import ClusterConfig, Launcher

TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
PLAIN = re.compile(r"[\w.:,=%@+/-]+", re.ASCII)  # what Slurm reads as it stands
BLOCK = re.compile(r"^# >>> (\w+)\n(.*?)^# <<<$", re.MULTILINE | re.DOTALL)


def render(blocks: Mapping[str, Sequence[str]], template: str) -> str:
    """``template`` with the lines between ``# >>> name`` and ``# <<<`` replaced, for each name in ``blocks``."""
    names = [found[1] for found in BLOCK.finditer(template)]
    assert sorted(names) == sorted(blocks), f"the template has the blocks {names}"
    return BLOCK.sub(lambda found: "".join(f"{line}\n" for line in blocks[found[1]]).rstrip("\n") or "# none", template)


def list_options(cluster: ClusterConfig, name: str, output: str, elements: int = 1) -> dict[str, str | None]:
    """The options of a job called ``name``: values by long name, None where an option takes none.

    ``output`` is Slurm's pattern for what the job prints; ``elements`` above 1 make it an array of so many.
    """
    tasks = 1 if cluster.launcher is Launcher.torchrun else cluster.devices_per_node
    cores = cluster.cpus_per_task and cluster.cpus_per_task * (cluster.devices_per_node // tasks)
    limit = f"%{cluster.array_parallelism}" if cluster.array_parallelism else ""
    values = {
        "job-name": name,
        "nodes": cluster.nodes + cluster.spares,
        "ntasks-per-node": tasks,
        "cpus-per-task": cores,
        "gres": cluster.gres,
        "mem": cluster.mem,
        "time": cluster.timeout_min,
        "partition": cluster.partition,
        "qos": cluster.qos,
        "account": cluster.account,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "dependency": cluster.dependency,
        "array": f"0-{elements - 1}{limit}" if elements > 1 else None,
        "output": output,
        "signal": f"B:USR2@{cluster.signal_seconds}",
    }
    flags = ["requeue" if cluster.requeue else "no-requeue", *(["no-kill"] if cluster.spares else [])]
    own = {key.replace("_", "-"): value for key, value in cluster.additional_parameters.items()}
    return {
        **{key: str(value) for key, value in values.items() if value is not None},
        **dict.fromkeys(flags),
        **{key: None if value.lower() in ("", "true") else value for key, value in own.items()},
    }


def write_options(options: Mapping[str, str | None]) -> list[str]:
    """Lines of ``#SBATCH`` that Slurm reads back as the same options."""
    return [f"#SBATCH --{name}" + ("" if value is None else f"={_quote(value)}") for name, value in options.items()]


def _quote(value: str) -> str:
    return value if PLAIN.fullmatch(value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def write_pattern(folder: Path, name: str) -> str:
    """The pattern of a file in ``folder`` whose name has Slurm's own patterns. ValueError for a path that none can say.

    A backslash anywhere makes Slurm take the whole path letter by letter, %j included.
    """
    text = str(folder)
    if "\\" in text or not text.isprintable():
        shown = text.encode("unicode_escape").decode()
        raise ValueError(
            f"run.folder: {shown} must be a path of printable characters without backslashes, for Slurm writes there"
        )
    return f"{text.replace('%', '%%')}/{name}"


def write_run(folder: Path, python: Sequence[str], here: Path, array: bool = False) -> list[str]:
    """The lines that say where the run is: ``folder``, or, of an ``array``, the folder of links to its runs."""
    words = " ".join(map(shlex.quote, python))
    place = shlex.quote(str(folder))
    found = f'$(readlink -f -- {place}/"$SLURM_ARRAY_TASK_ID")' if array else place
    return [f"cd -- {shlex.quote(str(here))}", f"python=({words})", f"folder={found}"]
