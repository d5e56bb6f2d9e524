"""What Slurm is told: slurm.conf and gres.conf of a test cluster, as text. A pure function of a ``Shape``.

Times are as short as Slurm allows: a node that says nothing is down after 6 s, a job that is requeued waits for 5 s
(``cred_expire``; on a cluster with Slurm's own 120 s, two minutes).
"""

from dataclasses import dataclass

# `main` is where jobs go; one in `urgent` requeues those of `main` that are in its way, GraceTime seconds after it has
# warned them.
PARTITIONS = """
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
SETTINGS = """
ClusterName=test
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={port}
SlurmdPort=6818
StateSaveLocation={state}
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/slurmd-%n.pid
SlurmctldLogFile={logs}/slurmctld.log
SlurmdLogFile={logs}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
PropagateResourceLimits=NONE
SlurmdTimeout={patience}
SlurmctldTimeout=6
MessageTimeout=5
KillWait=3
InactiveLimit=0
WaitTime=0
"""
# Nodes that would be started when a job is given them.
CLOUD = """
NodeName=c[1-{count}] CPUs=128 State=CLOUD
SuspendProgram=/bin/true
ResumeProgram=/bin/true
SuspendTime=60
"""


@dataclass(frozen=True)
class Shape:
    """How many nodes, what each says it has, and seconds from a preemption's warning to its end."""

    nodes: int = 2
    cpus: int = 4
    gpus: int = 0
    grace: int = 20
    patience: int = 6  # seconds until a node that says nothing is down
    cloud: int = 0  # further nodes, c1 and on, of 128 CPUs: Slurm could have them, and nobody starts them

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= 64:
            raise ValueError(f"nodes={self.nodes} must be from 1 to 64")
        if self.cpus < 1 or self.gpus < 0 or self.grace < 0:
            raise ValueError(f"cpus={self.cpus} must be at least 1, gpus={self.gpus} and grace={self.grace} at least 0")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"n{number + 1}" for number in range(self.nodes))


def write_slurm(shape: Shape, nodes: list[str], **words: object) -> str:
    """slurm.conf: ``nodes`` has what is particular to each, such as its NodeAddr; ``words`` fill SETTINGS."""
    gres = f" Gres=gpu:{shape.gpus}" if shape.gpus else ""
    lines = [
        SETTINGS.format(patience=shape.patience, **words),
        *(["GresTypes=gpu"] if shape.gpus else []),
        *(
            f"NodeName={name} {node} CPUs={shape.cpus}{gres} State=UNKNOWN"
            for name, node in zip(shape.names, nodes, strict=True)
        ),
        *([CLOUD.format(count=shape.cloud)] if shape.cloud else []),
        PARTITIONS.format(grace=shape.grace),
    ]
    return "\n".join(lines)


def write_gres(shape: Shape, device: str) -> str:
    """gres.conf: ``device`` is the path of a node's devices without their number; they are character devices."""
    return "".join(f"Name=gpu File={device}{number}\n" for number in range(shape.gpus))
