"""Configuration of the machines a run is given, and of how they are asked for: only the launcher sees these.

    pp * dp * cp * tp ranks = nodes * devices_per_node        one rank a device
    nodes + spares                                            what Slurm is asked for

Options of Slurm's have the names that submitit gives them, where it knows them.
"""

import re
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import StrEnum

OPTION = re.compile(r"[a-z][a-z0-9-]*")
NODES = re.compile(r"[\w.,\[\]-]+")  # a list as Slurm writes it: n1,n[3-5]
LONGEST = 65535  # seconds, of a warning: what Slurm can keep
# Options of sbatch that are ours: the key that sets each, or why none does.
OURS = {
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes and cluster.devices_per_node",
    "ntasks-per-node": "cluster.devices_per_node",
    "partition": "cluster.partition",
    "qos": "cluster.qos",
    "account": "cluster.account",
    "constraint": "cluster.constraint",
    "exclude": "cluster.exclude",
    "gres": "cluster.gres",
    "time": "cluster.timeout_min",
    "cpus-per-task": "cluster.cpus_per_task",
    "mem": "cluster.mem",
    "dependency": "cluster.dependency",
    "signal": "cluster.signal_seconds",
    "requeue": "cluster.requeue",
    "no-requeue": "cluster.requeue",
    "no-kill": "cluster.spares",
    "container-image": "cluster.container_image",
    "container-mounts": "cluster.container_mounts",
    "job-name": "run.id or run.name",
    "output": "run.folder: the run's folder has the output",
    "error": "run.folder: the run's folder has the output",
    "open-mode": "nothing: output of a job that is requeued is appended",
    "chdir": "the folder that you submit from",
    "array": "--multirun",
    "test-only": "--dry-run",
    "parsable": "nothing: shoestring reads it",
    "wait": "nothing: shoestring status says how it stands",
    "wrap": "nothing: shoestring writes the script",
}


class Scheduler(StrEnum):
    """Who hands out machines. ``local``: this one is all there is."""

    local = "local"
    slurm = "slurm"


class Launcher(StrEnum):
    """Who starts the ranks of a node under Slurm."""

    srun = "srun"  # each is a task of Slurm's
    torchrun = "torchrun"  # one task a node, whose agent starts them


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The machines a run is given. All from ``partition`` on is Slurm's."""

    name: str = "local"
    scheduler: Scheduler = Scheduler.local
    nodes: int = 1  # that the ranks are on
    devices_per_node: int = 8  # ranks that share a machine, and its fast links
    device_gigabytes: float | None = None  # memory of a device; null: a rank's state is not compared with it
    price_per_device_hour: float = 0.0  # in whatever currency you think in
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    constraint: str | None = None  # features that nodes must have, as h100&nvlink
    exclude: str | None = None  # nodes not to be used, as n1,n[3-5]
    gres: str | None = None  # devices of a node, as gpu:8; null: none is asked for
    timeout_min: int | None = None  # minutes that a job may take; null: what the partition gives
    cpus_per_task: int | None = None  # cores of a rank; null: what Slurm gives a task
    mem: str | None = None  # memory of a node, as 500G; 0: all of it; null: what Slurm gives
    dependency: str | None = None  # jobs to wait for, as afterany:123
    array_parallelism: int | None = None  # jobs of a --multirun at a time; null: as many as there is room for
    setup: tuple[str, ...] = ()  # lines of shell that come first, run as they are: module load cuda
    additional_parameters: dict[str, str] = field(default_factory=dict)  # of sbatch, {nice: 100, exclusive: true}
    container_image: str | None = None  # that ranks run in, by pyxis: srun --container-image
    container_mounts: tuple[str, ...] = ()  # of it, each as from:to or from:to:ro
    signal_seconds: int = 120  # before its end that a run is told of it, to make a checkpoint
    requeue: bool = True  # a job that is preempted, out of time or loses a node waits in the queue again
    spares: int = 0  # further nodes, that stand by for one that is lost
    launcher: Launcher = Launcher.srun
    python: str | None = None  # the interpreter on the nodes; null: the one that submits

    def __post_init__(self) -> None:
        for name in ("nodes", "devices_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"cluster.{name}={getattr(self, name)} must be at least 1")
        if self.price_per_device_hour < 0:
            raise ValueError(f"cluster.price_per_device_hour={self.price_per_device_hour} must not be negative")
        if self.device_gigabytes is not None and not self.device_gigabytes > 0:
            raise ValueError(f"cluster.device_gigabytes={self.device_gigabytes} must be positive, or null")
        self._check_scheduler()
        self._check_numbers()
        for key, text in self.texts():
            check_text(key, text)
        self._check_texts()

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.devices_per_node

    def texts(self) -> list[tuple[str, str]]:
        """Every text that goes to Slurm or into a script, with its dotted key."""
        found: list[tuple[str, str]] = []
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, StrEnum) or each.name == "setup":
                continue
            if isinstance(value, str):
                found.append((f"cluster.{each.name}", value))
            elif isinstance(value, tuple):
                found += [(f"cluster.{each.name}", item) for item in value]
        return found

    def _check_scheduler(self) -> None:
        """What is Slurm's alone is refused elsewhere: it would be forgotten without a word."""
        if self.scheduler is Scheduler.slurm:
            return
        known = fields(self)
        first = [each.name for each in known].index("partition")
        for each in known[first:]:
            if (value := getattr(self, each.name)) != _default(each):
                raise ValueError(
                    f"cluster.{each.name}={_write(value)} needs cluster=slurm: no scheduler takes it on this machine"
                )
        if self.nodes > 1:
            raise ValueError(f"cluster.nodes={self.nodes} needs cluster=slurm: this machine is one node")

    def _check_numbers(self) -> None:
        for name in ("timeout_min", "cpus_per_task", "array_parallelism", "signal_seconds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(
                    f"cluster.{name}={value} must be at least 1{'' if name == 'signal_seconds' else ', or null'}"
                )
        if self.spares < 0:
            raise ValueError(f"cluster.spares={self.spares} must not be negative")
        if self.signal_seconds > LONGEST:
            raise ValueError(
                f"cluster.signal_seconds={self.signal_seconds} must be at most {LONGEST}, which Slurm can keep"
            )
        if self.timeout_min is not None and self.signal_seconds >= 60 * self.timeout_min:
            raise ValueError(
                f"cluster.signal_seconds={self.signal_seconds} must be below the {60 * self.timeout_min} seconds of "
                f"cluster.timeout_min={self.timeout_min}: a run is told of its end before that"
            )

    def _check_texts(self) -> None:
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            raise ValueError(
                f"cluster.mem={self.mem} must be a number with K, M, G or T behind it, as 500G (0: all of a node)"
            )
        if self.exclude is not None and not NODES.fullmatch(self.exclude):
            raise ValueError(f"cluster.exclude={self.exclude} must be names of nodes, as n1,n[3-5]")
        if self.container_mounts and self.container_image is None:
            raise ValueError(
                f"cluster.container_mounts={_write(self.container_mounts)} needs cluster.container_image: they are "
                "mounted in it"
            )
        for mount in self.container_mounts:
            if not re.fullmatch(r"[^:,]+:[^:,]+(:[^:,]+)?", mount):
                raise ValueError(f"cluster.container_mounts={mount} must be from:to, or from:to:flags, without commas")
        for line in self.setup:
            if "\0" in line:
                raise ValueError("cluster.setup must be lines of shell, without the character NUL")
        for name, value in self.additional_parameters.items():
            self._check_parameter(name, value)

    def _check_parameter(self, name: str, value: str) -> None:
        key, option = f"cluster.additional_parameters.{name}", name.replace("_", "-")
        if option in OURS:
            raise ValueError(f"{key}={value} must be left to {OURS[option]}")
        if not OPTION.fullmatch(option):
            raise ValueError(
                f"{key}={value} must be named like a long option of sbatch, without dashes in front: mail-type"
            )
        if value:
            check_text(key, value)


def check_text(key: str, text: str) -> None:
    """Raises ValueError for a text that no line of a script can hold, or that is none."""
    shown = text.encode("unicode_escape").decode()
    if not text.strip():
        raise ValueError(f"{key}={shown} must not be empty: null stands for nothing")
    if text != text.strip():
        raise ValueError(f"{key}={shown} must not begin or end with a space")
    if not text.isprintable():
        raise ValueError(f"{key}={shown} must be printable characters on a single line")


def _default(each: Field[object]) -> object:
    return each.default if each.default_factory is MISSING else each.default_factory()


def _write(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {text}' for key, text in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)
